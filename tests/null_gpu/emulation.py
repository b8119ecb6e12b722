"""Values for the null GPU: each operation on its tensors is launched, which does nothing, and computed on the CPU.

The device's memory is the host's: results are computed of tensors on the CPU over the same addresses. What a capture
contains is computed at each replay, of what stands at its addresses then, as on a GPU. Importing this switches it on in
all threads.

With VALUES in the environment nothing in captures or compiled functions is computed, nor an operation on a tensor of
more numbers than that: counts of a large model need only the small tensors that rules decide with. Without it
`torch.compile` leaves functions as they are.
"""

import ctypes
import math
import os
import threading

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from tests.helpers_device import launches_nothing, masks_of

MOST = int(os.environ["VALUES"]) if "VALUES" in os.environ else None
torch.backends.cudnn.enabled = False  # it has a runtime of its own
torch.backends.cuda.enable_cudnn_sdp(False)

# their results are as many as the data say, so that a device must be waited for
SIZED_BY_DATA = {"nonzero", "masked_select", "bincount", "_unique2", "unique_dim", "unique_consecutive", "equal"}
# on CUDA its statistics are float32 beside values of 16 bits, which the CPU does not compute
WIDENED = {"native_layer_norm_backward"}
BOOKKEEPING = {"record_stream", "is_pinned", "_pin_memory", "resize_", "set_", "_local_scalar_dense", "detach", "alias"}


def on_host(x):
    """A tensor of the device as one of the CPU in the same place, without holding its memory; all else as it is."""
    if isinstance(x, torch.device):
        return torch.device("cpu")
    if not isinstance(x, torch.Tensor) or x.device.type != "cuda":
        return x
    if not x.numel():
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    memory = (ctypes.c_byte * (span * x.element_size())).from_address(x.data_ptr())
    return torch.frombuffer(memory, dtype=x.dtype, count=span).as_strided(x.shape, x.stride())


# ------------------------------------------------------------------------------------- attention, by CUDA's operations


def _weights(query, key, bias, causal, scale):
    """(softmax, log of its sum, scale)."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = query.float() @ key.float().transpose(-1, -2) * scale
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    scores = scores if bias is None else scores + bias.float()
    return scores.softmax(dim=-1), scores.logsumexp(dim=-1), scale


def _attend(results, query, key, value, bias, causal, scale):
    weights, sums, _ = _weights(query, key, bias, causal, scale)
    results[0].copy_(weights @ value.float())
    if results[1].shape == sums.shape:
        results[1].copy_(sums)


def _attend_backward(results, grad, query, key, value, bias, causal, scale):
    weights, _, scale = _weights(query, key, bias, causal, scale)
    grad = grad.float()
    of_weights = grad @ value.float().transpose(-1, -2)
    of_scores = weights * (of_weights - (of_weights * weights).sum(dim=-1, keepdim=True)) * scale
    grads = of_scores @ key.float(), of_scores.transpose(-1, -2) @ query.float(), weights.transpose(-1, -2) @ grad
    for result, value in zip(results, grads):
        result.copy_(value)


def flash(results, query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, scale=None):
    _attend(results, query, key, value, None, is_causal, scale)


def flash_backward(results, grad, query, key, value, *rest, scale=None):
    _attend_backward(results, grad, query, key, value, None, rest[7], scale)


def efficient(results, query, key, value, bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, scale=None):
    _attend(results, query, key, value, bias, is_causal, scale)


def efficient_backward(results, grad, query, key, value, bias, *rest, scale=None):
    _attend_backward(results, grad, query, key, value, bias, len(rest) > 6 and rest[6], scale)


ONLY_ON_CUDA = {
    "_scaled_dot_product_flash_attention": flash,
    "_scaled_dot_product_flash_attention_backward": flash_backward,
    "_scaled_dot_product_efficient_attention": efficient,
    "_scaled_dot_product_efficient_attention_backward": efficient_backward,
}


# ------------------------------------------------------------------------------------------------------ all operations


class Emulation(TorchDispatchMode):
    """Computes what operations on the device would have. captured: those of the capture that is under way."""

    captured = None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        is_made_there = torch.device(kwargs.get("device") or "cpu").type == "cuda"
        name = function._schema.name.removeprefix("aten::")
        if not is_made_there and all(x.device.type == "cpu" for x in tensors):
            return function(*args, **kwargs)
        if name in BOOKKEEPING or launches_nothing(function):
            return function(*args, **kwargs)
        if MOST is not None and max((x.numel() for x in tensors), default=0) > MOST:
            return function(*args, **kwargs)
        near_args, near_kwargs = tree_map(on_host, (args, kwargs))
        near_kwargs.pop("pin_memory", None)
        repeats = function is torch.ops.aten.repeat_interleave.Tensor
        if name in SIZED_BY_DATA or repeats or masks_of(function, args):
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(f"{name} waits for the device, which a capture may not")
            made = function(*near_args, **near_kwargs)
            return args[0] if function._schema.is_mutable else tree_map(_to_device, made)
        result = function(*args, **kwargs)
        places = [] if function._schema.is_mutable else tree_map(on_host, tree_flatten(result)[0])

        def compute():
            if name in ONLY_ON_CUDA:
                ONLY_ON_CUDA[name](places, *near_args, **near_kwargs)
                return
            # an operation that writes to its arguments has no places
            made = function(*(tree_map(_widened, near_args) if name in WIDENED else near_args), **near_kwargs)
            for place, value in zip(places, tree_flatten(made)[0]):
                if isinstance(value, torch.Tensor) and value.numel():
                    place.copy_(value)

        if Emulation.captured is None or not torch.cuda.is_current_stream_capturing():
            compute()
        elif MOST is None:
            Emulation.captured.append(compute)
        return result


def _widened(x):
    """A tensor in float32, where it has 16 bits."""
    return x.float() if isinstance(x, torch.Tensor) and x.dtype in (torch.float16, torch.bfloat16) else x


def _to_device(x):
    return torch.empty_like(x, device="cuda").copy_(x) if isinstance(x, torch.Tensor) else x


def _compiling(compile):
    """torch.compile, whose results run outside of the mode, under which they would not be compiled."""

    def compile_it(*args, **options):
        compiled = compile(*args, **options)

        def run(*args, **kwargs):
            with _disable_current_modes():
                return compiled(*args, **kwargs)

        return run

    return compile_it


def install() -> None:
    """Compute values from now on, in this thread and those that start later, and in replays."""
    if MOST is not None:
        torch.compile = _compiling(torch.compile)
    show = torch.Tensor.__repr__  # looks up which numbers are finite, with all modes off
    torch.Tensor.__repr__ = lambda x, **how: show(x.cpu() if x.is_cuda else x, **how)
    graph = torch.cuda.CUDAGraph
    begin, end, replay = graph.capture_begin, graph.capture_end, graph.replay
    run = threading.Thread.run

    def capture_begin(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        Emulation.captured = []

    def capture_end(self):
        self.operations, Emulation.captured = Emulation.captured, None
        end(self)

    def replayed(self):
        replay(self)
        with torch._C._DisableTorchDispatch():
            for compute in self.operations:
                compute()

    def run_emulated(self):
        with Emulation():
            run(self)

    graph.capture_begin, graph.capture_end, graph.replay = capture_begin, capture_end, replayed
    threading.Thread.run = run_emulated
    Emulation().__enter__()


install()
