"""A device that no machine has: tests on any machine show what a GPU would refuse, and where it would be waited for.

Tensors on it are computed on the CPU, with the same values; but they may not meet tensors of the host in an operation,
and what brings their values to the host is counted. Programs run on it whole, training included.
"""

import contextlib
import sys
from collections import Counter
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from util import dist

ROOT = Path(__file__).resolve().parents[1]
DEVICE = torch.device("lazy")  # a type that autograd knows on every machine and nothing uses
# Operations that take tensors of both, as on CUDA.
MIXED = {"aten::copy_", "aten::_to_copy", "aten::index.Tensor", "aten::index_put", "aten::index_put_"}


class FarTensor(torch.Tensor):
    """A tensor on DEVICE; `near` has its values."""

    @staticmethod
    def __new__(cls, near):
        options = dict(strides=near.stride(), storage_offset=near.storage_offset(), dtype=near.dtype, device=DEVICE)
        return torch.Tensor._make_wrapper_subclass(cls, near.size(), **options)

    def __init__(self, near):
        self.near = near

    def __repr__(self, **options):
        return f"FarTensor({self.near})"

    def __reduce_ex__(self, protocol):
        return self.near.__reduce_ex__(protocol)  # files are read to the CPU

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError("a far tensor is used outside `pretended`")


def is_far(device) -> bool:
    """Is this DEVICE?"""
    return device is not None and torch.device(device).type == DEVICE.type


def near(value):
    """A far tensor's values; another value as it is."""
    return value.near if isinstance(value, FarTensor) else value


class _Operations(TorchDispatchMode):
    """Runs every operation; `waits` counts by "file:function" what waits for DEVICE, copies to it that do too
    among it; `launches` by name what computes there or copies."""

    def __init__(self):
        super().__init__()
        self.waits, self.launches = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        far = [x for x in tensors if isinstance(x, FarTensor)]
        target = kwargs.get("device")
        if not far and not is_far(target):
            return function(*args, **kwargs)
        name = function._schema.name
        host = [x for x in tensors if not isinstance(x, FarTensor) and x.dim() > 0]
        if far and host and name not in MIXED and f"{name}.{function._overloadname}" not in MIXED:
            shapes = [[tuple(x.shape) for x in kind] for kind in (far, host)]
            raise RuntimeError(f"{name}: all tensors must be on one device: {shapes[0]} are far, {shapes[1]} are not")
        goes_near = name == "aten::_to_copy" and target is not None and not is_far(target)
        by_mask = any(isinstance(x, FarTensor) for x in masks_of(function, args))
        reads = name in ("aten::_local_scalar_dense", "aten::nonzero") or by_mask or (far and goes_near)
        if reads or sends_and_waits(function, args, kwargs):
            self.waits[_caller()] += 1
        if not launches_nothing(function):
            self.launches[name] += 1
        options = kwargs | ({"device": torch.device("cpu")} if is_far(target) else {})
        result = function(*tree_map(near, args), **tree_map(near, options))
        written = {id(x.near): x for x in far}  # an operation in place gives back its own tensor
        stays = is_far(target) if target is not None else bool(far)
        if name == "aten::copy_":
            stays = isinstance(args[0], FarTensor)

        def wrapped(x):
            if not isinstance(x, torch.Tensor) or not stays:
                return x
            return written[id(x)] if id(x) in written else FarTensor(x)

        return tree_map(wrapped, result)


def masks_of(function, args) -> list[torch.Tensor]:
    """The masks that an operation indexes by: where they are True decides the size of its work."""
    is_lookup = function._schema.name in ("aten::index", "aten::index_put", "aten::index_put_")
    return [x for x in (args[1] if is_lookup else []) if isinstance(x, torch.Tensor) and x.dtype == torch.bool]


def sends_and_waits(function, args, options) -> bool:
    """Does an operation copy a tensor of the host to DEVICE without `non_blocking`? CUDA waits for all before it."""
    name = function._schema.name
    if name == "aten::_to_copy":
        return not isinstance(args[0], FarTensor) and not options.get("non_blocking", False)
    if name == "aten::copy_":
        return not isinstance(args[1], FarTensor) and not (*args[2:], options.get("non_blocking", False))[0]
    is_lookup = name in ("aten::index", "aten::index_put", "aten::index_put_")
    return is_lookup and any(isinstance(x, torch.Tensor) and not isinstance(x, FarTensor) for x in args[1])


def launches_nothing(function) -> bool:
    """Is this a view, or memory alone?"""
    aliases = [x.alias_info for x in function._schema.returns]
    name = function._schema.name.removeprefix("aten::")
    return any(x is not None and not x.is_write for x in aliases) or "empty" in name or name == "_unsafe_view"


class _Functions(TorchFunctionMode):
    """What reaches no operation: making a tensor of numbers, and reading it as a list."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor) and is_far(kwargs.get("device")):
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        if function is torch.Tensor.tolist and isinstance(args[0], FarTensor):
            return args[0].cpu().tolist()
        return function(*args, **kwargs)


def _caller() -> str:
    """The innermost "file:function" of the project that is running."""
    frame = sys._getframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path.parts[len(ROOT.parts)] not in ("tests", ".venv"):
            return f"{path.relative_to(ROOT)}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "the test"


@contextlib.contextmanager
def pretended(monkeypatch, launches: bool = False):
    """Programs that pick a device by themselves run on DEVICE inside; gives the Counter of waits, or of launches."""
    autocast, of_overwriting = torch.autocast, torch.__future__.get_overwrite_module_params_on_conversion()
    pick = dist.pick_device
    operations = _Operations()
    with monkeypatch.context() as patch:
        patch.setattr(dist, "pick_device", lambda name: DEVICE if name == "auto" else pick(name))
        patch.setattr(torch, "autocast", lambda kind, *a, **k: autocast("cpu" if is_far(kind) else kind, *a, **k))
        patch.setattr(torch, DEVICE.type, torch.cpu, raising=False)  # its module, of which `checkpoint` asks
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            with operations, _Functions():
                yield operations.launches if launches else operations.waits
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(of_overwriting)
