"""Layers for sampling: weights held in the 16 bits that autocast computes in, or products of 8-bit integers.

Under autocast a CUDA graph rounds the weights anew at every replay; here they are rounded once, and held beside those
of float32. What is linear between two products is multiplied into the weights before: gains and offsets of norms, and
the 1 of 1 + scale. For a GPU that is a third fewer small kernels. CPUs multiply 8-bit integers several times faster
than floats: y = x·Wᵀ + b with each row of x and of W rounded to 255 levels between minus and plus its largest
magnitude. Products of integers are exact, so a row of y depends on its row of x only. The other layers compute in
floats, whose last bit depends on the batch size and can change the rounding of a value. So in int8 an image depends on
its batch, by less than one rounding step.
"""

from collections.abc import Callable
from copy import deepcopy
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from models.diffloss import ResBlock, SimpleMLPAdaLN
from util import dist
from util.graphs import autocast_state
from util.timing import run_seconds

CPU = torch.device("cpu")
ROWS = 256  # computed at a time: their intermediate results stay in the processor's cache


class Rounded(nn.Module):
    """x·Wᵀ + b of W (out, in) and b (out,) or None, rounded to a float of 16 bits; not among a model's parameters."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.register_buffer("weight", weight.to(dtype), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.to(dtype), persistent=False)

    def forward(self, x):
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class HeldLinear(nn.Linear):
    """A linear layer that shares the parameters of `layer`, which must not change afterwards, and has them rounded too.

    The rounded ones are what autocast to this dtype, a float of 16 bits, computes with. norm: the LayerNorm before it,
    whose gain and offset they contain, as `HeldNorm` leaves these out: W·(γ·n + β) + b = (W·diag γ)·n + (W·β + b).
    """

    def __init__(self, layer: nn.Linear, dtype: torch.dtype, norm: nn.LayerNorm | None = None):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias, self.dtype = layer.weight, layer.bias, dtype
        weight, bias = _values(layer)
        if norm is not None:
            gain, offset = _values(norm)
            shift = weight @ offset
            weight, bias = weight * gain, shift if bias is None else bias + shift
        self.held = Rounded(weight, bias, dtype)

    def forward(self, x):
        """x (..., in) to (..., out): under autocast to this dtype of the rounded weights, else of the others."""
        return self.held(x) if autocast_state(x.device) == self.dtype else super().forward(x)


class HeldNorm(nn.LayerNorm):
    """A LayerNorm γ·n + β that shares the parameters of `norm`; under autocast to this dtype n alone, rounded to it.

    n has a mean of 0 and a variance of 1. The layer after it is a `HeldLinear`, which has γ and β.
    """

    def __init__(self, norm: nn.LayerNorm, dtype: torch.dtype):
        super().__init__(norm.normalized_shape, norm.eps, device="meta")
        self.weight, self.bias, self.dtype = norm.weight, norm.bias, dtype

    def forward(self, x):
        """x (..., D) to the same shape."""
        if autocast_state(x.device) != self.dtype:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):  # which on CUDA would make x float32, where it is not
            return F.layer_norm(x, self.normalized_shape, eps=self.eps).to(self.dtype)


class HeldMLP(nn.Module):
    """The denoising MLP of a diffusion loss with weights of 16 bits: (x, time, condition) as `SimpleMLPAdaLN.forward`.

    What all blocks take from the condition is one product, (N, (3·depth + 2)·W): shift, scale and gate of each block,
    shift and scale of the last layer. With LN(x) = γ·n + β a block's LN(x)·(1 + s) + b is n·s' + b', s' = γ·(1 + s) and
    b' = β·(1 + s) + b, and these are linear in what s and b are linear in.
    """

    def __init__(self, net: SimpleMLPAdaLN, dtype: torch.dtype):
        super().__init__()
        self.dtype, self.eps = dtype, net.final_layer.norm_final.eps
        parts = [part for block in net.res_blocks for part in _moved(block.adaLN_modulation[1], block.in_ln)]
        parts += _moved(net.final_layer.adaLN_modulation[1])
        self.joined = Rounded(*(torch.cat(values) for values in zip(*parts)), dtype)
        self.input, self.output = (Rounded(*_values(x), dtype) for x in (net.input_proj, net.final_layer.linear))
        self.pairs = nn.ModuleList(
            nn.ModuleList(Rounded(*_values(block.mlp[i]), dtype) for i in (0, 2)) for block in net.res_blocks
        )

    def forward(self, x, time, condition):
        """(N, 2C) in this dtype, of x (N, C), time (N, W) or (1, W), condition (N, W)."""
        with torch.autocast(x.device.type, enabled=False):
            x = self.input(x)  # (N, W)
            *modulations, shift, scale = self.joined(F.silu(time + condition)).split(x.shape[-1], dim=-1)
            for i, (first, second) in enumerate(self.pairs):
                shift_in, scale_in, gate = modulations[3 * i : 3 * i + 3]
                x = torch.addcmul(x, gate, second(F.silu(first(self._modulated(x, shift_in, scale_in)))))
            return self.output(self._modulated(x, shift, scale))

    def _modulated(self, x, shift, scale):
        return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=self.eps), scale)


def _values(module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight, bias or None) of a layer or a norm, float32."""
    bias = None if module.bias is None else module.bias.detach().float()
    return module.weight.detach().float(), bias


def _moved(layer: nn.Linear, norm: nn.LayerNorm | None = None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(weight, bias) of b', of s' and of a gate, if the layer gives one beside b and s; see `HeldMLP`."""
    width = layer.in_features
    (shift, scale, *gate), (shift_bias, scale_bias, *gate_bias) = (x.split(width) for x in _values(layer))
    scale_bias = scale_bias + 1
    if norm is not None:
        gain, offset = _values(norm)
        shift, shift_bias = shift + offset[:, None] * scale, shift_bias + offset * scale_bias
        scale, scale_bias = gain[:, None] * scale, gain * scale_bias
    return [(shift, shift_bias), (scale, scale_bias), *zip(gate, gate_bias)]


class Int8Linear(nn.Linear):
    """A linear layer that shares the parameters of `layer`, which must not change afterwards."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        rounded, steps = _round_rows(layer.weight.detach().float())
        self.register_buffer("rounded", rounded.t(), persistent=False)  # (in, out)
        self.register_buffer("steps", steps.squeeze(1), persistent=False)  # (out,)

    @torch.no_grad()
    def forward(self, x):
        """x (..., in) to (..., out), float32, without gradient."""
        rows = x.reshape(-1, self.in_features).float()
        y = rows.new_empty(len(rows), self.out_features)
        bias = 0.0 if self.bias is None else self.bias
        # compiled, a loop would be another program for each number of rows
        size = max(len(rows), 1) if torch.compiler.is_compiling() else ROWS
        for part, out in zip(rows.split(size), y.split(size)):
            rounded, steps = _round_rows(part)
            out.copy_(torch._int_mm(rounded, self.rounded)).mul_(steps).mul_(self.steps).add_(bias)
        return y.reshape(*x.shape[:-1], self.out_features)


def _round_rows(x):
    """(int8 (N, K), steps (N, 1)) whose product is near x (N, K); a row that is not finite has a step that is not."""
    steps = x.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 127  # above 0: a row of zeros is not divided by 0
    return (x / steps).round_().to(torch.int8), steps


def prepare(model, dtype: torch.dtype) -> None:
    """Let the blocks of a `models.families.Backbone` compute in this dtype, for sampling, in place.

    The parameters stay as they are, and so do their names, but must not change any more; for float32 nothing changes.
    int8 is for a model on the CPU; on a processor whose 8-bit products are not exact it raises ValueError. A second
    time, for another dtype, is a RuntimeError.
    """
    if dtype == torch.int8 and not is_exact():
        raise ValueError("dtype int8 needs a processor with exact 8-bit products (VNNI); valid here: fp32, bf16")
    if not dist.is_half(dtype) and dtype != torch.int8:
        return
    if any(isinstance(module, Int8Linear | HeldLinear) for module in model.modules()):
        raise RuntimeError("the model is prepared for a dtype already")
    for block in model.blocks:
        if dtype == torch.int8:  # torch._int_mm is wrong for one input
            _replace_linear(block, lambda name, layer: Int8Linear(layer) if layer.in_features > 1 else layer)
        elif not isinstance(block, ResBlock):  # those are in a HeldMLP
            _hold(block, dtype)
    for net in [module for module in model.modules() if isinstance(module, SimpleMLPAdaLN)]:
        net.held = None if dtype == torch.int8 else HeldMLP(net, dtype)


def prepared(model, dtype: torch.dtype):
    """A model prepared for this dtype that shares its parameters with `model`, which stays as it is.

    They must not change while it is used. For float32 it is the model itself; else it is not compiled.
    """
    if dtype == torch.float32:
        return model
    shared = [*model.parameters(), *([model.prompts] if hasattr(model, "prompts") else [])]
    copy = deepcopy(model, {id(x): x for x in shared})
    prepare(copy, dtype)
    return copy


def _hold(block: nn.Module, dtype: torch.dtype) -> None:
    """Let a block's linear layers, and the norms in block.normed, compute in a dtype of 16 bits."""
    norms = {linear: name for name, linear in getattr(block, "normed", ())}

    def held(name, layer):
        return HeldLinear(layer, dtype, block.get_submodule(norms[name]) if name in norms else None)

    _replace_linear(block, held)
    for name in norms.values():
        setattr(block, name, HeldNorm(block.get_submodule(name), dtype))


def _replace_linear(block: nn.Module, make: Callable) -> None:
    """Put make(name, layer) in the place of each linear layer of a block."""
    for name, layer in list(block.named_modules()):
        if type(layer) is nn.Linear:
            parent, _, last = name.rpartition(".")
            setattr(block.get_submodule(parent), last, make(name, layer))


def is_exact() -> bool:
    """Are this processor's 8-bit products exact? Some without VNNI lose part of the sum of two large ones."""
    large = torch.full((64, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(large, large) == 64 * 127**2).all())


def fast_dtype(device: torch.device, width: int) -> str:
    """The dtype in which this device computes a model of this width fastest; all processes get the first one's answer.

    A CPU is measured, since many that have bf16 do it at half the speed of float32, and small layers gain nothing from
    int8. Another dtype than fp32 must be 1.5 times as fast, a difference that noise does not make.
    """
    if device.type != "cpu":
        return "bf16" if dist.pick_dtype(None, device) == torch.bfloat16 else "fp32"
    names, index = list(dist.DTYPES), 0
    if dist.is_main():
        seconds = layer_seconds(width)
        seconds["fp32"] /= 1.5
        index = names.index(min(seconds, key=seconds.get))
    return names[int(dist.all_sum(torch.tensor(index)))]  # the sum is the first process's, the others add 0


@torch.no_grad()
def layer_seconds(width: int) -> dict[str, float]:
    """Seconds that a linear layer (width, 4·width) takes on the CPU for 256 rows, in each dtype that the CPU has.

    Each is the least of 20 turns, the one that other programs disturbed least.
    """
    x, layer = torch.randn(256, width), nn.Linear(width, 4 * width)
    products = {"fp32": partial(layer, x), "bf16": partial(deepcopy(layer).bfloat16(), x.bfloat16())}
    if is_exact():
        products["int8"] = partial(Int8Linear(layer), x)
    turns = [{name: run_seconds(CPU, product) for name, product in products.items()} for _ in range(20)]
    return {name: min(turn[name] for turn in turns) for name in products}
