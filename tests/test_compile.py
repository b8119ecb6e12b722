"""Compiled parts compute what the others do, and many of them share a program.

Slow ones, those that only count too: what torch.compile leaves behind slows all later tests of a process.
"""

from copy import deepcopy

import pytest
import torch
from torch.fx.experimental import _config as shapes

from heads.policy import build_rules
from models import compiled
from models.low_precision import is_exact, prepare
from sampling.loop import generate
from tests import test_pass_graphs as passes
from tests.helpers import tiny_mar
from tests.helpers_var import tokenizer as scales_tokenizer
from tests.test_var import tiny as tiny_var
from util import dist

SCALES = dict(cfg=2.0, order="raster", group="scale")
LAGGING = "cache, no guidance at first", "causal, no guidance at first"
FAMILIES = {name: (*passes.FAMILIES[name][:2], {}) for name in ("mar", "causal", "causal, random", "maskgil", *LAGGING)}
FAMILIES["var"] = (tiny_var, SCALES, dict(tokenizer=scales_tokenizer()))
MOST = {"mar": 5, "causal": 5, "causal, random": 5, "maskgil": 3, LAGGING[0]: 8, LAGGING[1]: 9, "var": 13}


@pytest.fixture
def programs(monkeypatch):
    """The counts of what torch.compile traces; it leaves out making programs of it, which takes long."""
    compile = torch.compile
    compiled._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda part, **options: compile(part, backend="eager", **options))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with shapes.patch(use_duck_shape=True), torch._dynamo.config.patch(cache_size_limit=8):
        yield torch._dynamo.utils.counters
    torch._dynamo.reset()
    compiled._compiled.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_layers_and_batches_of_all_sizes_share_a_few_programs(name, programs):
    """Of one image and of several, with labels and without, also where what has none lags behind.

    A batch may have as many images as a block has heads, or as there are inputs of its buffer.
    """
    make, settings, given = FAMILIES[name]
    model = make()
    other = deepcopy(model)
    other.compile_parts()
    for size in (3, 2, 1, 4):
        seeds, labels = range(size), torch.arange(size) % 3
        made, expected = (passes.sample(m, settings, seeds, labels, **given) for m in (other, model))
        torch.testing.assert_close(made, expected)
    assert 3 <= programs["stats"]["unique_graphs"] <= MOST[name] and not programs["graph_break"]
    assert not programs["unimplemented"], "too many programs: the rest is not compiled"


def test_where_nothing_can_be_compiled_that_is_one_line(monkeypatch):
    def fails(function):
        raise RuntimeError("No working C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", fails)
    mar = tiny_mar()
    with pytest.raises(
        ValueError, match=r"--compile does not work here, leave it out: No working C\+\+ compiler found$"
    ):
        mar.compile_parts()
    assert mar.encoder_blocks[0]._compiled_call_impl is None


@pytest.mark.slow
@pytest.mark.parametrize("drop_path_rate", (0.0, 0.3))
def test_training_of_var_shares_a_few_programs(drop_path_rate, programs):
    """Its blocks leave out branches at rates of their own."""
    model = tiny_var(depth=3, drop_path_rate=drop_path_rate).train()
    model.compile_parts()
    for _ in range(2):
        model(torch.tensor([0, 1, 2]), torch.randn(3, 29, 8)).sum().backward()
    assert programs["stats"]["unique_graphs"] <= 3 and not programs["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ("mar", LAGGING[0]))
def test_in_16_bits_nothing_breaks_a_program_in_two(name, programs):
    """Torch 2.11 cannot trace whether a device has autocast, and then every layer would stand alone."""
    make, settings, _ = FAMILIES[name]
    model = make()
    prepare(model, torch.bfloat16)
    model.compile_parts()
    for size in (3, 1):
        with dist.autocast(torch.device("cpu"), torch.bfloat16):
            passes.sample(model, settings, range(size), torch.arange(size) % 3)
    assert programs["stats"]["unique_graphs"] <= MOST[name] + 2
    assert not programs["graph_break"] and not programs["unimplemented"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ("causal", "causal, random", "maskgil", "var"))
def test_compiled_families_sample_the_same(name):
    make, settings, given = FAMILIES[name]
    model = make()
    other = deepcopy(model)
    other.compile_parts()
    for size in (3, 1):
        seeds, labels = range(size), torch.arange(size) % 3
        made, expected = (passes.sample(m, settings, seeds, labels, **given) for m in (other, model))
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("refresh_every", (1, 3))
@pytest.mark.parametrize("dtype", ("fp32", "bf16", "int8"))
def test_compiled_images_are_those_of_the_others(dtype, refresh_every):
    """Of bf16 and int8 nearly so: the last bit of a float may tip a rounding, and of bf16 a token."""
    mar = tiny_mar(encoder_depth=2, decoder_depth=2)
    if dtype == "int8" and not is_exact():
        pytest.skip("this processor's 8-bit products are not exact")
    prepare(mar, dist.DTYPES[dtype])
    other = deepcopy(mar)
    other.compile_parts()
    options = dict(num_iter=5, num_steps=3, clip=(-2.0, 2.0), refresh_every=refresh_every)
    rules = build_rules("baseline", cfg=2.0)
    for size in (3, 4, 2):  # other batches, other numbers of tokens
        with dist.autocast(torch.device("cpu"), dist.DTYPES[dtype]):
            found, expected = (
                generate(model, torch.arange(size) % 3, rules, seeds=range(size), **options) for model in (other, mar)
            )
        difference = (found - expected).abs()
        assert difference.max() < {"fp32": 1e-4, "bf16": torch.inf, "int8": 0.05}[dtype] and difference.mean() < 0.02
    assert torch._dynamo.utils.counters["frames"]["total"] > 0
