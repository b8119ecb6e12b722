"""MaskGIL's network, training masks and loss: every array of the fixture, and what must hold at other sizes."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.blocks import LlamaConfig, grid_table
from models.mask_schedules import MASK_RATIOS, STEP_WEIGHTS
from models.maskgil import MASKGIL_CONFIGS, ROPES, MaskGIL, MaskGILConfig, draw_mask, token_loss, token_schedule
from tests.helpers_maskgil import ENTRIES, LENGTH, REFERENCE, VARIANTS, published, tensor, tiny_maskgil

SHAPES = json.loads((Path(__file__).parent / "fixtures" / "maskgil_state_dict_shapes.json").read_text())
CODE = dict(rope="published", qk_norm=False, post_norm=False)


def close(actual, name, rtol=1e-4, atol=2e-5):
    np.testing.assert_allclose(actual.detach().numpy(), REFERENCE[name], rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", SHAPES)
def test_published_sizes_have_the_published_keys_and_shapes(name):
    with torch.device("meta"):
        model = MaskGIL(replace(MASKGIL_CONFIGS[name], **CODE))
        paper = MaskGIL(MASKGIL_CONFIGS[name])
    assert model.config == MaskGILConfig(**SHAPES[name]["args"], **CODE)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == SHAPES[name]["state_dict"]
    count, more = (sum(p.numel() for p in m.parameters()) for m in (model, paper))
    assert count == SHAPES[name]["params"] and more - count == 2 * 64 * model.config.n_layer


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_and_gradients(variant):
    model, ids, mask, labels = published(variant), tensor("ids"), tensor("mask"), tensor("labels")
    assert sorted(f"{k} {tuple(v.shape)}" for k, v in model.state_dict().items()) == sorted(
        REFERENCE[f"{variant}/keys"]
    )
    close(ROPES[model.config.rope](model.config, (4, LENGTH // 4)), f"{variant}/rotary")
    layers = []
    for block in model.layers:
        block.register_forward_hook(lambda block, inputs, output: layers.append(output))
    logits = model.logits(ids, mask, labels)
    close(torch.stack(layers), f"{variant}/layers")
    close(logits, f"{variant}/logits")
    for none in (None, torch.full_like(labels, -1)):
        close(model.logits(ids, mask, none), f"{variant}/logits_uncond")
    loss = token_loss(logits, ids)
    close(loss, f"{variant}/loss_all")
    close(token_loss(logits, ids, mask), f"{variant}/loss_masked")
    head, z = model.token_head, model.encode_decode(ids, mask, labels).flatten(0, 1)
    torch.testing.assert_close(head.losses(head.predict(ids, z, {}), ids.flatten(), {})["ce"].mean(), loss)
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, [parameters[str(name)] for name in REFERENCE[f"{variant}/grad_names"]])
    norms = [float(g.norm()) for g in gradients]
    np.testing.assert_allclose(norms, REFERENCE[f"{variant}/grad_norms"], rtol=2e-3)


@pytest.mark.parametrize("kind", MASK_RATIOS)
def test_training_masks(kind):
    r, u, mask = (tensor(f"train_mask/{kind}/{name}") for name in ("r", "u", "mask"))
    assert draw_mask(kind, r, u).equal(mask)
    ends = draw_mask(kind, torch.tensor([0.0, 1.0]), torch.tensor([[0.5, 1 - 2**-24], [0.0, 0.5]]))
    whole = 1 if kind in ("linear", "square") else 0  # of r, where all is masked
    assert ends[whole].all() and not ends[1 - whole].any()
    with pytest.raises(ValueError, match="unknown mask schedule 'x'; valid: arccos, cosine, linear, square"):
        draw_mask("x", r, u)


def test_token_schedules_are_the_published_ones():
    for line in REFERENCE["schedules"]:
        name, counts = str(line).split(": ")
        kind, total, num_iter = name.split()
        expected = [int(part) for part in counts.split(",")]
        assert token_schedule(kind, int(num_iter.split("=")[1]), int(total.split("=")[1])) == expected
    assert len(REFERENCE["schedules"]) == 240
    with pytest.raises(ValueError, match="unknown token schedule 'x'; valid: arccos, cosine, root, linear, square"):
        token_schedule("x", 8, 16)
    assert token_schedule("arccos", 8, 0) == []
    for num_iter, total, message in ((0, 16, "num_iter must be at least 1, got 0"), (8, -1, "total .* got -1")):
        with pytest.raises(ValueError, match=message):
            token_schedule("arccos", num_iter, total)


@pytest.mark.parametrize("kind", STEP_WEIGHTS)
def test_every_token_schedule_reveals_each_token_once(kind):
    """The published one has numbers of 0 and below with many steps, and none at all with one."""
    for total in (1, 2, 15, 64):
        for num_iter in range(1, 2 * total + 1):
            counts = token_schedule(kind, num_iter, total)
            assert sum(counts) == total and min(counts) >= 1 and len(counts) <= num_iter
    assert token_schedule(kind, 1, 256) == [256]
    for num_iter in (66, 68, 98, 512):
        assert sum(token_schedule(kind, num_iter, 256)) == 256


@pytest.mark.parametrize("rope", ROPES)
@torch.no_grad()
def test_masked_ids_are_not_looked_at(rope):
    model = tiny_maskgil(rope=rope)
    ids = torch.randint(ENTRIES, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    mask, labels = torch.arange(LENGTH).expand(3, -1) % 3 > 0, torch.tensor([0, 3, -1])
    z = model.encode_decode(ids, mask, labels)
    assert model.encode_decode(torch.where(mask, (ids + 1) % ENTRIES, ids), mask, labels).equal(z)
    assert not model.encode_decode((ids + 1) % ENTRIES, mask, labels).equal(z)
    assert not model.encode_decode(ids, mask, labels.flip(0)).allclose(z)
    assert not model.encode_decode(ids, ~mask, labels).allclose(z)
    # a token that is known is no mask token, and every token looks at every other
    other = ids.clone()
    other[:, 0] = (other[:, 0] + 1) % ENTRIES
    assert (model.encode_decode(other, mask, labels) != z).any(dim=2).all()


def test_a_rectangle_has_the_positions_of_a_part_of_the_square():
    c = LlamaConfig(dim=32, n_head=2)
    square = grid_table(c, 5, 5).view(5, 5, 8, 2)
    torch.testing.assert_close(grid_table(c, 3, 4).view(3, 4, 8, 2), square[:3, :4], rtol=0, atol=0)


def test_the_first_loss_is_ln_of_the_entries_and_the_mask_token():
    model = MaskGIL(replace(MASKGIL_CONFIGS["maskgil_tiny"], img_size=64))
    ids = torch.randint(0, 16384, (2, 16))
    logits = model.logits(ids, torch.ones(2, 16).bool())
    assert logits.shape == (2, 16, 16385)
    assert token_loss(logits, ids).item() == pytest.approx(math.log(16385), rel=1e-6)
    assert token_loss(logits, ids, torch.zeros(2, 16).bool()).item() == 0


def test_the_mask_token_is_in_the_loss_and_never_in_what_is_drawn():
    model = tiny_maskgil()
    head, z = model.token_head, torch.randn(5, model.width)
    with torch.no_grad():
        head.weight[-1] = 100 * z.sum(dim=0)  # its logit is the largest
    assert head.all_logits(z)[:, :-1].equal(head.logits(z)) and head.logits(z).shape == (5, ENTRIES)
    rows = torch.cartesian_prod(torch.arange(1), torch.arange(5))
    sampler = head.sampler()
    noise = sampler.noise([torch.Generator().manual_seed(0)], rows, 1)
    ids = sampler.draw(z, None, 1.0, 1.0, noise, 1)
    assert noise.shape == (5, ENTRIES) and ids.max() < ENTRIES
    assert sampler.log_prob(ids, z, None, 1.0, 1.0).exp().min() > 0
    everything = torch.stack([sampler.log_prob(torch.full((5,), i), z, None, 1.0, 1.0) for i in range(ENTRIES)])
    torch.testing.assert_close(everything.exp().sum(dim=0), torch.ones(5))


@pytest.mark.parametrize("switches", [{}, CODE], ids=["paper", "code"])
@torch.no_grad()
def test_bfloat16_is_near_float32(switches):
    model = tiny_maskgil(**switches)
    ids, labels = torch.arange(LENGTH).expand(2, -1), torch.tensor([1, -1])
    mask = torch.arange(LENGTH).expand(2, -1) % 2 > 0
    expected = model.logits(ids, mask, labels)
    with torch.autocast("cpu", torch.bfloat16):
        near = model.logits(ids, mask, labels)
    own = tiny_maskgil(**switches).bfloat16().logits(ids, mask, labels)
    for logits in (near, own):
        assert logits.dtype == torch.float32
        assert (logits - expected).abs().mean() < 0.02 * expected.abs().mean()


COUNTS = "dim n_layer n_head n_kv_head multiple_of vocab_size class_num".split()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(block_size=15), "block_size 15 must be a square"),
        (dict(n_head=5), "dim 768 must be a multiple of 4·n_head = 20"),
        (dict(n_kv_head=5), "n_head 12 must be a multiple of n_kv_head 5"),
        (dict(rope="1d"), "unknown rope '1d'; valid: 2d, published"),
        (dict(mask_schedule="root"), "unknown mask_schedule 'root'; valid: arccos, cosine, linear, square"),
        (dict(loss_tokens="some"), "unknown loss_tokens 'some'; valid: all, masked"),
        (dict(drop_path_rate=0.1), "drop_path_rate 0.1 must be 0.0 of a MaskGIL of classes"),
        *((dict([(name, 0)]), f"{name} must be at least 1, got 0") for name in COUNTS),
    ],
)
def test_sizes_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MaskGILConfig(**options)
