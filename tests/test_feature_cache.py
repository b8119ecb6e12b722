"""The feature cache: exact where it must be, for any rules, and independent of which images share a batch."""

from dataclasses import replace

import pytest
import torch

from heads.orders import ORDERS
from heads.policy import build_rules
from models.mar_cache import FeatureCache, Features
from sampling.loop import generate
from tests.helpers import tiny_mar

SIDE, LENGTH, CLIP = 4, 16, (-2.0, 2.0)
LABELS, SEEDS = torch.tensor([0, 2, -1, 1]), [11, 12, 13, 14]


@pytest.fixture(scope="module")
def deep():
    return tiny_mar(img_size=SIDE, encoder_depth=2, decoder_depth=2)


@pytest.fixture(scope="module")
def shallow():
    """Keys and values of its one block are functions of a token's own value: the cache keeps what a pass would make."""
    return tiny_mar(img_size=SIDE, encoder_depth=0, decoder_depth=1)


def ragged(rules):
    """Groups of a size of its own for each image."""
    return replace(rules, group=lambda state: 1.0 + (state.images + state.step) % 3)


def switching(rules):
    """Guidance that comes and goes, at another step in each image."""
    return replace(rules, cfg=lambda state, after: 1.0 + (((state.images + state.step) % 3) == 1).float().unsqueeze(1))


RULES = {
    "baseline": lambda cfg, order: build_rules("baseline", cfg=cfg, order=order),
    "interval": lambda cfg, order: build_rules(
        "baseline", cfg=cfg, order=order, cfg_schedule="interval", cfg_interval="0.2,0.7"
    ),
    "ragged": lambda cfg, order: ragged(build_rules("baseline", cfg=cfg, order=order)),
    "ragged, switching": lambda cfg, order: switching(ragged(build_rules("baseline", cfg=cfg, order=order))),
}


def run(mar, rules, labels=LABELS, seeds=SEEDS, num_iter=6, **options):
    return generate(mar, labels, rules, num_iter, 3, seeds=seeds, clip=CLIP, **options)


@pytest.mark.parametrize("refresh_every", (2, 3, 99))
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("order", ("random", "halton"))
def test_exact_where_features_depend_on_the_token_alone(shallow, rules, order, refresh_every):
    rules = RULES[rules](2.0, order)
    torch.testing.assert_close(
        run(shallow, rules, refresh_every=refresh_every), run(shallow, rules), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("rules", RULES)
def test_an_image_does_not_depend_on_its_batch(deep, rules):
    rules, alone = RULES[rules](2.0, "random"), []
    together = run(deep, rules, refresh_every=3)
    for i in range(len(LABELS)):  # the rules above count images: keep the number that image i has in the batch
        mine = replace(rules, **{k: shifted(getattr(rules, k), i) for k in ("group", "cfg")})
        alone.append(run(deep, mine, LABELS[i : i + 1], SEEDS[i : i + 1], refresh_every=3))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def shifted(rule, by):
    return lambda state, *after: rule(replace(state, images=state.images + by), *after)


def test_a_pass_that_keeps_is_a_pass(deep):
    """Whole passes give the same z with and without a cache, also with different numbers of known tokens."""
    tokens = torch.randn(4, LENGTH, 1, generator=torch.Generator().manual_seed(0))
    unknown = torch.arange(LENGTH) >= torch.tensor([[0], [3], [7], [15]])
    keeping, images = FeatureCache(deep, LABELS, refresh_every=2), torch.arange(4)
    for step in (0, 2, 4):
        expected = deep.encode_decode(tokens, unknown, LABELS)
        torch.testing.assert_close(keeping.look(step, tokens, unknown, images)[0], expected, rtol=1e-5, atol=1e-6)
        rows = unknown.nonzero()
        free = deep.encode_decode(tokens, unknown)
        found, found_free = keeping.at(step, tokens, unknown, rows, torch.arange(0, len(rows), 2))
        torch.testing.assert_close(found, expected[unknown], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found_free, free[unknown][::2], rtol=1e-5, atol=1e-6)
        tokens, unknown = tokens + 1, unknown & (torch.arange(LENGTH) > 10)


def test_both_halves_of_a_partial_pass_are_one_batch(deep, monkeypatch):
    """Images with their label, and the guided ones without, go through the transformer together."""
    run_blocks, sizes = Features._run, []
    monkeypatch.setattr(Features, "_run", lambda *args, **kw: sizes.append(len(args[2])) or run_blocks(*args, **kw))
    cache, tokens, images = FeatureCache(deep, LABELS, refresh_every=9), torch.zeros(4, LENGTH, 1), torch.arange(4)
    for step in (0, 1):
        unknown = torch.arange(LENGTH).expand(4, -1) >= 3 * step
        rows = unknown.nonzero()
        guided = (rows[:, 0] != 2).nonzero().squeeze(1)
        cache.look(step, tokens, unknown, images)
        cache.at(step, tokens, unknown, rows, guided)
    assert sizes == [4, 4, 1, 1, 7, 7]  # encoder and decoder: the labels, no label on the empty canvas, all


def test_without_guidance_there_is_room_for_the_labels_only(deep):
    cache, tokens, images = FeatureCache(deep, LABELS, refresh_every=9), torch.zeros(4, LENGTH, 1), torch.arange(4)
    unknown = torch.ones(4, LENGTH, dtype=torch.bool)
    rows = unknown.nonzero()
    for guided, room in (([], 4), (torch.arange(3), 8)):
        cache.look(0, tokens, unknown, images)
        cache.at(0, tokens, unknown, rows, guided)
        assert len(cache.z) == room and {len(kept) for pair in cache.features.stores.values() for kept in pair} == {
            room
        }


def test_between_passes_only_new_tokens_matter(deep):
    """A partial pass: what was revealed since moves z, what the kept features stand for does not."""
    tokens = torch.randn(2, LENGTH, 1, generator=torch.Generator().manual_seed(0))
    labels, images = LABELS[:2], torch.arange(2)

    def z(old=0.0, new=0.0, hidden=0.0):
        cache = FeatureCache(deep, labels, refresh_every=9)
        unknown = torch.arange(LENGTH).expand(2, -1) >= 4
        cache.look(0, tokens, unknown, images)
        cache.at(0, tokens, unknown, unknown.nonzero(), torch.arange(24))
        later = tokens.clone()
        later[:, :4] += old
        later[:, 4:6] += new
        later[:, 6:] += hidden
        unknown = torch.arange(LENGTH).expand(2, -1) >= 6
        cache.look(1, later, unknown, images)
        return torch.cat(cache.at(1, later, unknown, unknown.nonzero(), torch.arange(20)))

    plain = z()
    assert torch.equal(z(old=1.0), plain)
    assert torch.equal(z(hidden=float("nan")), plain)
    assert not torch.allclose(z(new=1.0), plain, atol=1e-3)


def test_passes_are_counted_by_their_share(deep):
    counts = {}
    for every in (1, 3):
        cache, tokens, images = FeatureCache(deep, LABELS, every), torch.zeros(4, LENGTH, 1), torch.arange(4)
        for step in range(4):
            unknown = torch.arange(LENGTH).expand(4, -1) >= 2 * step
            cache.look(step, tokens, unknown, images)
            cache.at(step, tokens, unknown, (unknown & (torch.arange(LENGTH) < 2 * step + 2)).nonzero(), [])
        counts[every] = cache.passes
    size = deep.config.buffer_size
    # steps 1 and 2 are partial: 2 new tokens in encoder and decoder, 2 wanted ones, of all slots but the unknown
    parts = [6 / (2 * size + LENGTH + known) for known in (2, 4)]
    assert counts == {1: 16, 3: pytest.approx(4 * (2 + sum(parts)))}


@pytest.mark.parametrize("order", ORDERS)
def test_close_to_the_exact_images_at_first(deep, order):
    """The cache cannot have changed what is drawn before its first partial pass, and does change the rest a little."""
    rules = build_rules("baseline", cfg=1.5, order=order)

    def steps(every):
        seen = []
        run(deep, rules, refresh_every=every, callback=lambda *details: seen.append(details[-1].clone()))
        return seen

    plain, cached = steps(1), steps(4)
    assert torch.equal(plain[0], cached[0])
    assert not torch.equal(plain[-1], cached[-1])
    assert (plain[-1] - cached[-1]).abs().mean() < 0.5 * plain[-1].abs().mean()


@pytest.mark.parametrize("refresh_every", (1, 3))
def test_images_without_label_share_the_empty_canvas(deep, refresh_every, monkeypatch):
    """One image goes through the transformer for all of them, and nothing else changes."""
    encode, sizes = deep.encode, []
    monkeypatch.setattr(deep, "encode", lambda *args: sizes.append(len(args[0])) or encode(*args))
    tokens, images = torch.zeros(4, LENGTH, 1), torch.arange(4)
    cache = FeatureCache(deep, torch.full((4,), -1), refresh_every)  # with that label or without one is the same
    for step, known in enumerate((0, 3, 5)):
        unknown = torch.arange(LENGTH).expand(4, -1) >= known
        cache.look(step, tokens, unknown, images)
        rows = unknown.nonzero()
        z, z_free = cache.at(step, tokens, unknown, rows, torch.arange(len(rows)))
        torch.testing.assert_close(z, z_free, rtol=1e-5, atol=1e-6)
        tokens = tokens + 1
    assert sizes[:2] == [4, 1] and set(sizes[2:]) <= {4}
