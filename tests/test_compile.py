"""Compiled parts compute what the others do."""

from copy import deepcopy

import pytest
import torch

from heads.policy import build_rules
from models.low_precision import is_exact, prepare
from sampling.loop import generate
from tests.helpers import tiny_mar
from util import dist


def test_where_nothing_can_be_compiled_that_is_one_line(monkeypatch):
    def fails(function):
        raise RuntimeError("No working C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", fails)
    mar = tiny_mar()
    with pytest.raises(
        ValueError, match=r"--compile does not work here, leave it out: No working C\+\+ compiler found$"
    ):
        mar.compile_parts()
    assert not mar.compiled


@pytest.mark.slow
@pytest.mark.parametrize("refresh_every", (1, 3))
@pytest.mark.parametrize("dtype", ("fp32", "bf16", "int8"))
def test_compiled_images_are_those_of_the_others(dtype, refresh_every):
    """Of bf16 and int8 nearly so: the last bit of a float may tip a rounding, and of bf16 a token."""
    mar = tiny_mar(encoder_depth=2, decoder_depth=2)
    if dtype == "int8" and not is_exact():
        pytest.skip("this processor's 8-bit products are not exact")
    prepare(mar, dist.DTYPES[dtype])
    compiled = deepcopy(mar)
    compiled.compile_parts()
    assert compiled.compiled and not mar.compiled
    options = dict(num_iter=5, num_steps=3, clip=(-2.0, 2.0), refresh_every=refresh_every)
    rules = build_rules("baseline", cfg=2.0)
    for size in (3, 4, 2):  # other batches, other numbers of tokens
        with dist.autocast(torch.device("cpu"), dist.DTYPES[dtype]):
            found, expected = (
                generate(model, torch.arange(size) % 3, rules, seeds=range(size), **options)
                for model in (compiled, mar)
            )
        difference = (found - expected).abs()
        assert difference.max() < {"fp32": 1e-4, "bf16": torch.inf, "int8": 0.05}[dtype] and difference.mean() < 0.02
    assert torch._dynamo.utils.counters["frames"]["total"] > 0
