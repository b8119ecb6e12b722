"""What of a model is compiled: whole blocks, and where keys and values are kept what stands before and after attention.

Between these two is what differs from layer to layer and from step to step, the keys and values: compiled with a block,
each layer would be a program of its own. So all layers of one kind share a program.
"""

from functools import cache

import torch
from torch import nn
from torch.fx.experimental import _config as shapes

from util.graphs import release

MOST_PROGRAMS = 32  # of one function, beyond which torch leaves it as it is


def compile_all(model: nn.Module, parts) -> None:
    """Compile parts of a model in place, for batches of any size, and what `run_part` runs of them.

    ValueError where the model's device compiles nothing. What it has captured is dropped, or it would replay the parts
    as they were. A copy of the model is not compiled.
    """
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=next(model.parameters()).device))
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--compile does not work here, leave it out: {reason}") from None
    shapes.use_duck_shape = False  # sizes that happen to be equal, of batch and heads, would be another program
    limits = torch._dynamo.config  # one image or more, with gradient or without, either dtype: each is a program
    limits.cache_size_limit = max(limits.cache_size_limit, MOST_PROGRAMS)  # recompile_limit, which 2.6 has not
    for part in parts:
        part.compile(dynamic=True)
    release(model)


def run_part(part, block: nn.Module, *args):
    """part(block, *args), a method of the block's class, compiled if the block is."""
    return (part if block._compiled_call_impl is None else _compiled(part))(block, *args)


@cache
def _compiled(part):
    return torch.compile(part, dynamic=True)
