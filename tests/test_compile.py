"""Compiled parts compute what the others do."""

from copy import deepcopy

import pytest
import torch

from heads.policy import build_rules
from models.low_precision import is_exact, prepare
from sampling.loop import generate
from tests.helpers import tiny_mar


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
@pytest.mark.parametrize("dtype", ("fp32", "int8"))
def test_compiled_images_are_those_of_the_others(dtype, refresh_every):
    """Of int8 nearly so: the last bit of a float may tip a rounding."""
    mar = tiny_mar(encoder_depth=2, decoder_depth=2)
    if dtype == "int8":
        if not is_exact():
            pytest.skip("this processor's 8-bit products are not exact")
        prepare(mar, torch.int8)
    compiled = deepcopy(mar)
    compiled.compile_parts()
    assert compiled.compiled and not mar.compiled
    options = dict(num_iter=5, num_steps=3, clip=(-2.0, 2.0), refresh_every=refresh_every)
    rules = build_rules("baseline", cfg=2.0)
    for size in (3, 4, 2):  # other batches, other numbers of tokens
        found, expected = (
            generate(model, torch.arange(size) % 3, rules, seeds=range(size), **options) for model in (compiled, mar)
        )
        assert (found - expected).abs().max() < (1e-4 if dtype == "fp32" else 0.05)
    assert torch._dynamo.utils.counters["frames"]["total"] > 0
