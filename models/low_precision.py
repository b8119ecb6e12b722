"""Linear layers for sampling: weights held in the 16 bits that autocast computes in, or products of 8-bit integers.

Under autocast a CUDA graph rounds the weights anew at every replay; here they are rounded once, to the same values, and
held beside those of float32. CPUs multiply 8-bit integers several times faster than floats: y = x·Wᵀ + b with each row
of x and of W rounded to 255 levels between minus and plus its largest magnitude. Products of integers are exact, so a
row of y depends on its row of x only. The other layers compute in floats, whose last bit depends on the batch size and
can change the rounding of a value. So in int8 an image depends on its batch, by less than one rounding step.
"""

from copy import deepcopy
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from util import dist
from util.graphs import autocast_state
from util.timing import run_seconds

CPU = torch.device("cpu")
ROWS = 256  # computed at a time: their intermediate results stay in the processor's cache


class HeldLinear(nn.Linear):
    """A linear layer that shares the parameters of `layer`, which must not change afterwards, and has them rounded too.

    The rounded ones are those that autocast to this dtype, a float of 16 bits, computes with.
    """

    def __init__(self, layer: nn.Linear, dtype: torch.dtype):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.register_buffer("held_weight", layer.weight.detach().to(dtype), persistent=False)
        bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        self.register_buffer("held_bias", bias, persistent=False)

    def forward(self, x):
        """x (..., in) to (..., out), bit for bit what `layer` gives, under autocast or not."""
        if autocast_state(x.device) != self.held_weight.dtype:
            return F.linear(x, self.weight, self.bias)
        return F.linear(x.to(self.held_weight.dtype), self.held_weight, self.held_bias)


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
    make = Int8Linear if dtype == torch.int8 else partial(HeldLinear, dtype=dtype)
    for block in model.blocks:
        for module in list(block.modules()):
            for name, layer in module.named_children():
                if type(layer) is nn.Linear and layer.in_features > 1:  # torch._int_mm is wrong for 1
                    setattr(module, name, make(layer))


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
