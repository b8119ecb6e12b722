"""Causal MAR: what its outputs may depend on, the cache against one whole pass, and sampling through the loop."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from heads.policy import build_rules
from models.kv_cache import KeyValueCache
from models.mar import MAR, MAR_CONFIGS
from models.mar_ar import MAR_AR_CONFIGS, MARAR, MARARConfig
from sampling.loop import decode, generate
from tests.helpers_causal import ENTRIES, LENGTH, WholePass, some_orders, some_tokens, tiny_ar

KINDS = [("ce", "random"), ("ce", "raster"), ("diffusion", "random"), ("diffusion", "raster")]
LABELS, SEEDS = torch.tensor([0, 2, -1]), [5, 6, 7]


@pytest.fixture(params=KINDS, ids="-".join)
def model(request):
    return tiny_ar(*request.param)


def rules_of(model, **options):
    return build_rules("baseline", group="one", order=model.fixed_rules.get("order", "random"), **options)


def known_first(orders, unknown):
    return orders.gather(1, unknown.gather(1, orders).int().argsort(dim=1, stable=True))


@torch.no_grad()
def test_outputs_do_not_see_their_own_token_nor_later_ones(model):
    tokens, orders = some_tokens(model, 1), some_orders(model, 1)
    z = model.outputs(tokens, orders, LABELS[:1])[0]
    for j in (0, 7, LENGTH - 1):
        other = tokens.clone()
        other[:, orders[0, j]] = (other[:, orders[0, j]] + 1) % ENTRIES
        changed = (model.outputs(other, orders, LABELS[:1])[0] != z).any(dim=1)
        assert changed.tolist() == [i > j for i in range(LENGTH)]


def test_a_pass_of_training_needs_no_mask(model, monkeypatch):
    """So that CUDA's fast kernels take it; with activations computed again it is the same function."""
    attend, asked = F.scaled_dot_product_attention, []
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *args, **how: asked.append(how) or attend(*args, **how)
    )
    tokens, orders = some_tokens(model, 2), some_orders(model, 2)
    made = []
    for recomputing in (False, True):
        model.config = replace(model.config, grad_checkpointing=recomputing)
        torch.manual_seed(0)  # of dropout
        made.append(model.train().outputs(tokens, orders, LABELS[:2]))
    assert made[0].equal(made[1])
    assert len(asked) == 2 * len(model.layers)
    assert all(how["attn_mask"] is None and how["is_causal"] for how in asked)


@torch.no_grad()
def test_outputs_see_the_label_and_where_their_token_is_but_not_where_later_ones_are(model):
    tokens, orders = some_tokens(model, 1), some_orders(model, 1)
    z = model.outputs(tokens, orders, LABELS[:1])[0]
    assert (model.outputs(tokens, orders, LABELS[1:2])[0] != z).any(dim=1).all()
    assert model.outputs(tokens, orders).equal(model.outputs(tokens, orders, torch.tensor([-1])))
    swapped = orders.clone()
    swapped[:, [5, 9]] = orders[:, [9, 5]]
    before = model.outputs(tokens, swapped, LABELS[:1])[0]
    assert before[:5].equal(z[:5]) and not before[5].allclose(z[5])


@torch.no_grad()
def test_images_of_a_batch_have_their_own_orders(model):
    tokens, orders = some_tokens(model, 3), some_orders(model, 3)
    together = model.outputs(tokens, orders, LABELS)
    for i in range(3):
        one = slice(i, i + 1)
        torch.testing.assert_close(together[one], model.outputs(tokens[one], orders[one], LABELS[one]))
    by_position = model.encode_decode(tokens, None, LABELS, None, orders)
    assert by_position.gather(1, orders.unsqueeze(-1).expand_as(by_position)).equal(together)


@pytest.mark.parametrize("loss", ["ce", "diffusion"])
@torch.no_grad()
def test_relabelled_positions_change_nothing(loss):
    model = tiny_ar(loss)
    tokens, orders = some_tokens(model, 2), some_orders(model, 2)
    z = model.outputs(tokens, orders, LABELS[:2])
    new = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(3))  # position p becomes new[p]
    for name in ("pos_embed", "next_pos_embed", *(["diffusion_pos_embed"] if loss == "diffusion" else [])):
        table = getattr(model, name)
        table.copy_(table.clone()[new.argsort()])
    torch.testing.assert_close(model.outputs(tokens[:, new.argsort()], new[orders], LABELS[:2]), z)


@pytest.mark.parametrize("given", [0, 1, 9, LENGTH - 1])
@torch.no_grad()
def test_the_cache_gives_what_one_whole_pass_gives(model, given):
    """After a prefill of any length; the second half of an image joins late, and leaves for a step."""
    tokens, orders = some_tokens(model, 3), some_orders(model, 3)
    unknown = torch.ones(3, LENGTH, dtype=torch.bool).scatter(1, orders[:, :given], False)
    expected, free = model.outputs(tokens, orders, LABELS), model.outputs(tokens, orders)
    conditions, images = model.conditions(LABELS, orders=orders), torch.arange(3)
    for i in range(given, LENGTH):
        z, positions = conditions.look(i - given, tokens, unknown, images)
        assert positions.equal(orders[:, i : i + 1])
        torch.testing.assert_close(z[:, 0], expected[:, i], rtol=1e-4, atol=1e-5)
        rows = torch.cat([images.unsqueeze(1), positions], dim=1)
        guided = images[(images + i) % 3 > 0] if i % 4 else images[:0]
        z, z_uncond = conditions.at(i - given, tokens, unknown, rows, guided)
        torch.testing.assert_close(z, expected[:, i], rtol=1e-4, atol=1e-5)
        if len(guided):
            torch.testing.assert_close(z_uncond, free[guided, i], rtol=1e-4, atol=1e-5)
        assert (z_uncond is None) == (not len(guided))
        unknown = unknown.scatter(1, positions, False)


@torch.no_grad()
def test_sequences_of_different_lengths_share_a_pass():
    model = tiny_ar()
    tokens, orders = some_tokens(model, 3), some_orders(model, 3)
    expected, cache = model.outputs(tokens, orders, LABELS), KeyValueCache(3, LENGTH)
    for sequences, lengths in (([0, 2], [4, 1]), ([0, 1, 2], [5, 9, 6]), ([1], [10])):
        at = torch.tensor(sequences)
        extension = cache.extend(at, torch.tensor(lengths), tokens.device)
        z = model.extend(tokens[at], orders[at], LABELS[at], extension).squeeze(1)
        torch.testing.assert_close(z, expected[at, torch.tensor(lengths) - 1], rtol=1e-4, atol=1e-5)
    assert all(kept.shape == (3, LENGTH + 1, 2, 8) for pair in cache.stores.values() for kept in pair)


@pytest.mark.parametrize("cfg, schedule", [(1.0, "constant"), (2.5, "constant"), (2.5, "interval"), (2.5, "linear")])
@torch.no_grad()
def test_samples_are_those_drawn_without_a_cache(model, cfg, schedule, monkeypatch):
    rules = rules_of(model, cfg=cfg, cfg_schedule=schedule, cfg_interval="0.3,0.7", temperature=0.9)
    steps = []

    def made(**options):
        return generate(model, LABELS, rules, LENGTH, 2, seeds=SEEDS, clip=(-3.0, 3.0), **options)

    cached = made(callback=lambda step, rows, *_: steps.append(len(rows)))
    assert steps == [3] * LENGTH
    monkeypatch.setattr("models.mar_ar.CausalConditions", WholePass)
    torch.testing.assert_close(cached, made(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_without_guidance_no_second_half_runs(model):
    asked, extend = [], model.extend
    model.extend = lambda tokens, orders, labels, extension: (
        asked.append(labels is None) or extend(tokens, orders, labels, extension)
    )
    generate(model, LABELS, rules_of(model), LENGTH, 2, seeds=SEEDS)
    assert asked == [False] * LENGTH
    asked.clear()
    rules = replace(rules_of(model), cfg=lambda state, after: 2.0 if state.step == 4 else 1.0)
    generate(model, LABELS, rules, LENGTH, 2, seeds=SEEDS)
    assert asked == [False] * 5 + [True] + [False] * (LENGTH - 5)


@torch.no_grad()
def test_an_image_is_the_same_in_any_batch(model):
    rules = rules_of(model, cfg=2.0)
    together = generate(model, LABELS, rules, LENGTH, 2, seeds=SEEDS, clip=(-3.0, 3.0))
    for i in range(3):
        one = slice(i, i + 1)
        alone = generate(model, LABELS[one], rules, LENGTH, 2, seeds=SEEDS[one], clip=(-3.0, 3.0))
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_known_tokens_come_first_and_stay(model):
    """Any of a random model, a different number in each image; of a raster model those at the start."""
    tokens = some_tokens(model, 3)
    unknown = torch.ones(3, LENGTH, dtype=torch.bool)
    for i, given in enumerate([[0, 1, 2, 3, 4], [], [0]] if "order" in model.fixed_rules else [[3, 9], [], [1, 4, 15]]):
        unknown[i, given] = False
    orders = some_orders(model, 3)
    made = model.patchify(
        generate(model, LABELS, rules_of(model, cfg=2.0), LENGTH, 2, seeds=SEEDS, tokens=tokens, mask=unknown)
    )
    assert made[~unknown].equal(tokens[~unknown])
    drawn = []
    generate(
        model, LABELS, rules_of(model), LENGTH, 2, seeds=SEEDS, tokens=tokens, mask=unknown, orders=orders.flip(1),
        callback=lambda step, rows, *_: drawn.extend(rows.tolist()),
    )  # fmt: skip
    for i in range(3):
        left = known_first(orders, unknown)[i, int((~unknown[i]).sum()) :]
        assert [position for image, position in drawn if image == i] == left.tolist()


@torch.no_grad()
def test_a_raster_model_keeps_only_the_first_tokens():
    model = tiny_ar(ar_order="raster")
    unknown = torch.ones(3, LENGTH, dtype=torch.bool)
    unknown[1, 2] = False
    with pytest.raises(ValueError, match="a raster model keeps only the first tokens of an image, row by row"):
        generate(
            model, LABELS, rules_of(model), LENGTH, seeds=SEEDS, tokens=some_tokens(model, 3), mask=unknown
        )  # fmt: skip


@pytest.mark.parametrize("order", ["random", "raster", "halton", "center"])
@torch.no_grad()
def test_a_random_model_draws_in_any_order_that_is_known_ahead(order):
    drawn = []
    rules = build_rules("baseline", group="one", order=order)
    generate(tiny_ar(), LABELS, rules, LENGTH, seeds=SEEDS, callback=lambda s, rows, *_: drawn.append(rows[:, 1]))
    mar_drawn = []
    mar = MAR(replace(MAR_CONFIGS["mar_tiny"], img_size=8, vae_stride=2, vae_embed_dim=2, class_num=4)).eval()
    generate(mar, LABELS, rules, LENGTH, 1, seeds=SEEDS, callback=lambda s, rows, *_: mar_drawn.append(rows[:, 1]))
    assert torch.stack(drawn).equal(torch.stack(mar_drawn))


def test_orders_that_cannot_be_are_refused():
    raster, anyhow = tiny_ar(ar_order="raster"), tiny_ar()
    with pytest.raises(ValueError, match="needs --order raster"):
        generate(raster, LABELS, build_rules("baseline", group="one"), LENGTH)
    with pytest.raises(ValueError, match="--order must be known before the first token is drawn.*valid: random"):
        generate(anyhow, LABELS, build_rules("baseline", group="one", order="confidence"), LENGTH)
    with pytest.raises(ValueError, match="num_iter 4 is too small: 36 tokens are left"):
        generate(anyhow, LABELS, build_rules("baseline", group="one"), 4)


def test_the_loop_is_differentiable_with_its_cache():
    """In w, through the tokens and keys of earlier steps: against differences."""
    model = tiny_ar("diffusion")
    w = torch.tensor(2.0, requires_grad=True)

    def total(w):
        rules = replace(rules_of(model), cfg=lambda state, after: w.reshape(1, 1).expand(len(state.mask), 1))
        return decode(model, LABELS, rules, LENGTH, 2, seeds=SEEDS, clip=(-3.0, 3.0)).square().mean()

    (gradient,) = torch.autograd.grad(total(w), [w])
    with torch.no_grad():
        difference = (total(w + 1e-2) - total(w - 1e-2)) / 2e-2
    assert float(gradient) == pytest.approx(float(difference), rel=5e-2, abs=1e-3)


def test_the_first_loss_of_a_head_that_says_nothing_is_ln_v():
    model = tiny_ar(label_smoothing=0.0)
    torch.nn.init.zeros_(model.celoss.proj.weight), torch.nn.init.zeros_(model.celoss.proj.bias)
    tokens = some_tokens(model, 2)
    z = model.outputs(tokens, some_orders(model, 2)).flatten(0, 1)
    loss = model.celoss.losses(model.celoss.predict(tokens.flatten(), z, {}), tokens.flatten(), {})["ce"]
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(ENTRIES)))


@pytest.mark.parametrize("loss", ["ce", "diffusion"])
@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_sizes_have_the_parameters_of_mars(loss, size):
    own = dict(loss=loss, vocab_size=16384 if loss == "ce" else None)
    with torch.device("meta"):
        causal = MARAR(replace(MAR_AR_CONFIGS[f"mar_ar_{size}"], **own))
        mar = MAR(replace(MAR_CONFIGS[f"mar_{size}"], **own))
    counts = [sum(p.numel() for p in network.parameters()) for network in (causal, mar)]
    assert abs(counts[0] / counts[1] - 1) < 0.02
    assert causal.config.depth == len(causal.layers) == mar.config.encoder_depth + mar.config.decoder_depth


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(ar_order="spiral"), "unknown ar_order 'spiral'; valid: random, raster"),
        (dict(mask_ratio_min=0.7), "mask_ratio_min 0.7 must be 1.0"),
        (dict(encoder_num_heads=0), "encoder_num_heads must be at least 1, got 0"),
        (dict(encoder_embed_dim=512), "encoder_embed_dim 512 and decoder_embed_dim 1024 are of one stack"),
    ],
)
def test_sizes_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MARARConfig(**options)


def lines_of_one_colour(labels, generator):
    """Ids (B, 16) of a 4×4 grid of 4 colours: each row of one colour (label 0), or each column (label 1)."""
    colours = torch.randint(0, 4, (len(labels), 4), generator=generator)
    rows = colours.unsqueeze(2).expand(-1, 4, 4)
    return torch.where((labels == 0)[:, None, None], rows, rows.transpose(1, 2)).flatten(1)


@pytest.mark.slow
def test_random_orders_are_learned():
    """The best loss is ln(4)·4/16 = 0.3466; with one table of positions in place of two it stays above 1.1."""
    torch.manual_seed(0)
    sizes = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in
             (("embed_dim", 64), ("depth", 1), ("num_heads", 4))}  # fmt: skip
    options = dict(img_size=4, vae_stride=1, class_num=2, loss="ce", vocab_size=4, label_smoothing=0.0)
    model = MARAR(MARARConfig(**sizes, **options, attn_dropout=0.0, proj_dropout=0.0))
    optimizer, g, recent = torch.optim.AdamW(model.parameters(), 3e-3), torch.Generator().manual_seed(0), []
    for step in range(500):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / 500))
        labels = torch.randint(0, 2, (64,), generator=g)
        ids = lines_of_one_colour(labels, g)
        orders = torch.rand(64, 16, generator=g).argsort(dim=1)
        logits = model.head_logits(model.outputs(ids, orders, labels)).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, ids.gather(1, orders).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        recent = [*recent, loss.item()][-20:]
    assert sum(recent) / 20 < 0.40
