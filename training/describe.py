"""What a run says of itself before it starts."""

import warnings

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# in the order in which torch prefers them; cuDNN's is switched off, see models/__init__.py
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def size_line(name: str, model, heads, kernel: str) -> str:
    """Parameters of the transformer, of the token head and of the policy heads, in millions; one of KERNELS."""
    token_head = count(model.token_head)
    parts = {"transformer": count(model) - token_head, "token head": token_head}
    if heads is not None:
        parts["policy heads"] = count(heads)
    words = [f"{part} {number / 1e6:.2f} M" for part, number in parts.items()]
    return f"{name}: {words[0]} parameters, {', '.join(words[1:])}; unmasked attention: {kernel}"


def count(module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def attention_kernel(head_dim: int, device: torch.device, dtype: torch.dtype) -> str:
    """The first of KERNELS that computes attention with heads of this width, on this device, in this dtype."""
    dtype = torch.float32 if dtype == torch.int8 else dtype
    x = torch.zeros(1, 1, 8, head_dim, device=device, dtype=dtype)
    for name, kernel in KERNELS.items():
        try:
            with sdpa_kernel(kernel), warnings.catch_warnings(action="ignore"):  # on CUDA why each one is refused
                F.scaled_dot_product_attention(x, x, x)
        except RuntimeError:  # there is none for this
            continue
        return name
    return "none"
