"""Sampling with weights in 16 bits, which is what autocast does, and in 8-bit integers: exact where nothing is rounded,
bounded elsewhere, and the same weights to everybody.
"""

from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from heads.policy import build_rules
from models import low_precision
from models.diffloss import SimpleMLPAdaLN
from models.low_precision import ROWS, HeldLinear, HeldMLP, HeldNorm, Int8Linear, Rounded, is_exact, prepare
from sampling.loop import generate
from tests.helpers import named_weights, tiny_mar
from tests.helpers_causal import tiny_ar, tiny_gpt
from tests.helpers_ids import tiny_ids
from tests.helpers_maskgil import tiny_maskgil
from tests.helpers_var import tokenizer as scales_tokenizer
from tests.test_var import tiny as tiny_var
from util import dist
from util.checkpoint import weights_hash

CPU = torch.device("cpu")
LABELS = torch.tensor([0, 2, -1])
needs_int8 = pytest.mark.skipif(not is_exact(), reason="this processor's 8-bit products are not exact")


def layer_of(weight, bias=None):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    layer.weight.data = weight
    if bias is not None:
        layer.bias.data = bias
    return layer


def draws(seed):
    return torch.Generator().manual_seed(seed)


@needs_int8
@given(seed=st.integers(0, 2**31), rows=st.integers(0, 3), width=st.integers(2, 70), out=st.integers(1, 70))
def test_exact_on_integers(seed, rows, width, out):
    """Whole numbers up to 127, with a 127 in each row, are not rounded: then the product is that of the integers."""
    x = torch.randint(-127, 128, (rows, width), generator=draws(seed)).float()
    w = torch.randint(-127, 128, (out, width), generator=draws(seed + 1)).float()
    x[:, 0] = w[:, 0] = 127
    y = Int8Linear(layer_of(w))(x)
    assert y.dtype == torch.float32 and torch.equal(y.double(), (x.double() @ w.double().t()).float().double())


@needs_int8
@given(seed=st.integers(0, 2**31), scale=st.floats(1e-3, 1e3), outlier=st.floats(1, 1e4))
def test_error_is_that_of_the_rounding(seed, scale, outlier):
    """|y' − y| ≤ Σ |w|·s_x/2 + |x|·s_w/2 + s_x·s_w/4, s being a 127th of the row's largest magnitude."""
    x, w = (torch.randn(5, 40, generator=draws(seed + i), dtype=torch.float64) * scale for i in range(2))
    x[0, 3], b = outlier * scale, torch.randn(5, generator=draws(seed), dtype=torch.float64)
    s_x, s_w = (a.abs().amax(dim=1, keepdim=True) / 127 for a in (x, w))
    bound = s_x / 2 * w.abs().sum(dim=1) + x.abs().sum(dim=1, keepdim=True) * s_w.t() / 2 + 40 * s_x * s_w.t() / 4
    y = Int8Linear(layer_of(w.float(), b.float()))(x.float()).double()
    assert ((y - (x @ w.t() + b)).abs() <= bound * 1.001 + 1e-5).all()


@needs_int8
def test_a_row_depends_on_itself_only():
    """Also across the groups of rows that are computed together, and for any shape of the batch."""
    layer = Int8Linear(nn.Linear(24, 7))
    x = torch.randn(2 * ROWS + 3, 24, generator=draws(0))
    together = layer(x)
    assert torch.equal(together, torch.cat([layer(row[None]) for row in x]))
    changed = x.clone()
    changed[5] *= 1e3
    assert torch.equal(layer(changed)[6:], together[6:])
    assert torch.equal(layer(x[:30].reshape(2, 3, 5, 24)), together[:30].reshape(2, 3, 5, 7))
    assert layer(x[:0]).shape == (0, 7)


@needs_int8
def test_zeros_and_what_is_not_finite():
    layer = Int8Linear(layer_of(torch.ones(3, 4), torch.arange(3.0)))
    x = torch.zeros(3, 4)
    x[1, 2], x[2, 0] = float("nan"), float("inf")
    y = layer(x)
    assert torch.equal(y[0], torch.arange(3.0))
    assert not torch.isfinite(y[1:]).any()


def prepared(model, dtype=torch.int8):
    model = deepcopy(model)
    prepare(model, dtype)
    return model


@pytest.mark.parametrize("dtype", [pytest.param(torch.int8, marks=needs_int8), torch.bfloat16])
@pytest.mark.parametrize("width", (1, 16))
def test_the_parameters_stay_the_checkpoints(width, dtype):
    """Names, values and their hash are those of the floats; only inside blocks layers are replaced, or held beside."""
    plain = tiny_mar(diffloss_w=width)
    mar = prepared(plain, dtype)
    assert list(mar.state_dict()) == list(plain.state_dict())
    assert weights_hash(mar.state_dict()) == weights_hash(plain.state_dict())
    inside = ("encoder_blocks.", "decoder_blocks.")
    inside += ("diffloss.net.res_blocks.",) if dtype == torch.int8 else ()
    assert (mar.diffloss.net.held is None) == (dtype == torch.int8)
    for name, module in mar.named_modules():
        if isinstance(module, nn.Linear):
            replaced = name.startswith(inside) and module.in_features > 1
            assert (type(module) is not nn.Linear) == replaced, name
    assert all(
        type(module) is type(other) for module, other in zip(prepared(plain, torch.float32).modules(), plain.modules())
    )


FAMILIES = {
    "mar": (tiny_mar, dict(cfg=2.0), 4),
    "mar, cache": (tiny_mar, dict(cfg=2.0, refresh_every=2), 4),
    "mar, ids": (tiny_ids, dict(cfg=2.0), 4),
    "causal": (tiny_gpt, dict(cfg=2.0, order="raster", group="one"), None),
    "causal, latents": (lambda: tiny_ar("diffusion"), dict(cfg=2.0, group="one"), None),
    "maskgil": (tiny_maskgil, dict(cfg=2.0, order="confidence", group="step_arccos"), 4),
    "var": (tiny_var, dict(cfg=2.5, order="raster", group="scale"), None),
}


def drawn(model, options: dict, num_iter, dtype, device=CPU):
    """Latents, clipped as those of such a model would be, or ids of a batch under autocast."""
    rules = build_rules("baseline", **{name: value for name, value in options.items() if name != "refresh_every"})
    more = dict(refresh_every=options.get("refresh_every", 1), tokenizer=deepcopy(scales_tokenizer()).to(device))
    with dist.autocast(device, dtype):
        return generate(model, LABELS, rules, num_iter, num_steps=4, seeds=[1, 2, 3], clip=(-2.0, 2.0), **more)


NORMED = ("mar", "mar, cache", "mar, ids", "causal, latents")  # where norms are multiplied into the layers after them


@pytest.mark.parametrize("name", FAMILIES)
def test_held_weights_compute_what_autocast_does(name):
    """Bit for bit, or where norms are multiplied in, no farther from float32."""
    make, options, num_iter = FAMILIES[name]
    model = make()
    narrow = prepared(model, torch.bfloat16)
    held = [module for module in narrow.modules() if isinstance(module, Rounded)]
    assert held and all(module.weight.dtype == torch.bfloat16 for module in held)
    assert drawn(narrow, options, num_iter, torch.float32).equal(drawn(model, options, num_iter, torch.float32))
    by_autocast = drawn(model, options, num_iter, torch.bfloat16)
    assert not by_autocast.equal(drawn(model, options | dict(cfg=1.0), num_iter, torch.bfloat16))
    made = drawn(narrow, options, num_iter, torch.bfloat16)
    if name not in NORMED:
        assert made.equal(by_autocast)
        return
    check_rounding(model, narrow, torch.bfloat16)
    # nearly all of them: what is drawn in many steps may fall to another side
    assert ((made - by_autocast).abs() < 0.1).float().mean() > 0.8


def check_rounding(model, narrow, dtype, device=CPU):
    """z of given tokens, from which the rounding errors of several steps do not grow."""
    length, draw = model.config.seq_len, draws(0)
    tokens = model.token_head.empty(3, length).cpu()
    tokens = torch.randint(0, 8, tokens.shape, generator=draw) if tokens.dim() == 2 else tokens.normal_(generator=draw)
    orders = torch.stack([torch.randperm(length, generator=draw) for _ in range(3)])
    mask = torch.ones(3, length, dtype=torch.bool).scatter(1, orders[:, : length // 2], False)
    given = [x.to(device) for x in (tokens, mask, LABELS)] + [[length // 2] * 3, orders.to(device)]

    def z(model, dtype):
        with torch.no_grad(), dist.autocast(device, dtype):
            return model.encode_decode(*given).float()

    exact = z(model, torch.float32)
    held, by_autocast = ((z(some, dtype) - exact).square().mean().sqrt().item() for some in (narrow, model))
    assert 0 < held < 1.3 * by_autocast < 0.1 * exact.std().item()


def test_a_model_is_prepared_for_one_dtype():
    model = prepared(tiny_mar(), torch.bfloat16)
    with pytest.raises(RuntimeError, match="prepared for a dtype already"):
        prepare(model, torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES)
def test_held_weights_compute_what_autocast_does_on_a_gpu(name, dtype, monkeypatch):
    monkeypatch.setenv("CUDA_GRAPHS", "0")  # padded rows are others' rounding
    make, options, num_iter = FAMILIES[name]
    model, device = make().to("cuda"), torch.device("cuda")
    narrow = prepared(model, dtype)
    if name in NORMED:
        check_rounding(model, narrow, dtype, device)
    else:
        made = [drawn(m, options, num_iter, dtype, device) for m in (model, narrow)]
        assert made[0].equal(made[1])


@pytest.mark.parametrize("has_bias", (True, False))
@pytest.mark.parametrize("seed", range(5))
def test_a_norm_may_be_multiplied_into_the_layer_after_it(seed, has_bias):
    """Where nothing is rounded, it is the same function."""
    x, weight, gain, offset = (
        torch.randn(size, generator=draws(seed + i)) for i, size in enumerate(((7, 12), (5, 12), 12, 12))
    )
    layer, norm = layer_of(weight, torch.randn(5, generator=draws(seed + 4)) if has_bias else None), nn.LayerNorm(12)
    norm.weight.data, norm.bias.data = gain, offset
    held = HeldLinear(layer, torch.float32, norm)
    torch.testing.assert_close(held.held(F.layer_norm(x, (12,))), layer(norm(x)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(held(x), layer(x))  # without autocast the checkpoint's
    torch.testing.assert_close(HeldNorm(norm, torch.float32)(x), norm(x))


@pytest.mark.parametrize("depth", (1, 3))
@pytest.mark.parametrize("one_time", (True, False))
def test_the_joined_mlp_is_the_same_function(depth, one_time):
    net = named_weights(SimpleMLPAdaLN(3, 16, 8, depth), scale=0.3)
    x, z = (torch.randn(9, size, generator=draws(size)) for size in (3, 8))
    time, condition = net.time_embed(torch.tensor([5] if one_time else [7] * 8 + [999])), net.condition(z)
    with torch.no_grad():
        made, expected = HeldMLP(net, torch.float32)(x, time, condition), net(x, time, condition)
    assert expected.std() > 0.1
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_joined_mlp_rounds_no_worse_than_autocast(dtype):
    """Beside the exact function, over rows at every level of noise."""
    mar = tiny_mar(diffloss_w=64, diffloss_d=3)
    net = named_weights(mar.diffloss.net, scale=0.2)
    x, z = (
        torch.randn(500, net.input_proj.in_features, generator=draws(0)),
        torch.randn(500, mar.width, generator=draws(1)),
    )
    t = torch.arange(0, 1000, 2)
    with torch.no_grad():
        exact = deepcopy(net).double()
        expected = exact(x.double(), exact.time_embed(t), exact.condition(z.double()))
        narrow = prepared(mar, dtype).diffloss.net
        with dist.autocast(CPU, dtype):
            by_autocast, held = (some(x, some.time_embed(t), some.condition(z)) for some in (net, narrow))
    assert by_autocast.dtype == held.dtype == dtype and not held.equal(by_autocast)
    errors = [(y.double() - expected).square().mean().sqrt() for y in (held, by_autocast)]
    assert errors[0] < 1.2 * errors[1]


@needs_int8
@pytest.mark.parametrize("refresh_every", (1, 3))
def test_images_are_near_those_of_float32(refresh_every):
    """Nearer than the images of another seed by far; and what the batch changes is less than what the rounding does."""
    mar = tiny_mar(encoder_depth=3, decoder_depth=3, encoder_embed_dim=64, decoder_embed_dim=64, diffloss_w=64)
    options = dict(num_iter=6, num_steps=6, clip=(-2.0, 2.0), refresh_every=refresh_every)
    rules, labels = build_rules("baseline", cfg=2.0), torch.arange(6) % 3

    def images(mar, seeds=range(6), rows=slice(None)):
        return generate(mar, labels[rows], rules, seeds=seeds[rows], **options)

    exact, rounded, other = images(mar), images(prepared(mar)), images(mar, range(6, 12))
    parts = torch.cat([images(prepared(mar), rows=slice(i, i + 4)) for i in (0, 4)])

    def distance(a, b):
        return (a - b).abs().mean()

    assert 0 < distance(rounded, exact) < 0.1 * distance(other, exact)
    assert distance(parts, rounded) < 0.5 * distance(rounded, exact)


def test_a_processor_that_loses_bits_is_refused(monkeypatch):
    saturated = lambda a, b: (a.int() @ b.int()).clamp(max=2**15)  # noqa: E731
    monkeypatch.setattr(low_precision.torch, "_int_mm", saturated)
    with pytest.raises(ValueError, match="int8 needs a processor with exact 8-bit products .* valid here: fp32, bf16"):
        prepare(tiny_mar(), torch.int8)


def test_int8_is_for_the_cpu():
    assert dist.pick_dtype("int8", CPU) == torch.int8
    with pytest.raises(ValueError, match="int8 needs the device cpu, this is cuda; valid here: fp32, bf16, fp16"):
        dist.pick_dtype("int8", torch.device("cuda"))
    with dist.autocast(CPU, torch.int8):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
