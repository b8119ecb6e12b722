"""Captured draws of diffusion are those of the eager loop: plain calls on a CPU, under the rules of captures."""

from copy import deepcopy
from dataclasses import replace
from random import Random

import pytest
import torch

from diffusion.solvers import SOLVERS
from heads.policy import build_rules
from models.diffloss import DiffLoss
from sampling.loop import decode, generate
from tests.helpers import named_weights, randn, tiny_mar
from tests.helpers_causal import tiny_ar
from tests.helpers_device import DEVICE, near, pretended
from tests.helpers_diffusion import CHANNELS, CLIP, WIDTH
from tests.helpers_generate import LENGTH, ragged_rules, run
from tests.helpers_graphs import CPU, PlainCalls, eagerly
from util import graphs
from util.dist import autocast
from util.graphs import bucket


def random_draw(chance: Random, num_rows: int | None = None) -> dict:
    """Arguments of DiffLoss.sample with random rows, guidance, profile, solver and numbers."""
    seed, num_rows, num_steps = chance.randrange(10**6), num_rows or chance.randint(1, 70), chance.randint(1, 4)
    z, noise = randn(num_rows, WIDTH, seed=seed), randn(num_steps + 1, num_rows, CHANNELS, seed=seed + 1)
    numbers = [0.9, randn(num_rows, seed=seed + 2).abs(), randn(num_rows, 1, seed=seed + 3).abs(), torch.tensor(0.7)]
    options = dict(tau=chance.choice(numbers), solver=chance.choice(list(SOLVERS)), clip=CLIP, num_steps=num_steps)
    if chance.random() < 0.25:
        return dict(z=z, noise=noise, **options)
    guided = chance.choice([None, torch.tensor(sorted(chance.sample(range(num_rows), chance.randint(1, num_rows))))])
    free = randn(num_rows if guided is None else len(guided), WIDTH, seed=seed + 4)
    cfg = chance.choice([2.5, 3 * randn(num_rows, seed=seed + 5).abs()])
    of_rows, some = randn(num_rows, seed=seed + 6).abs(), chance.random()
    profiles = [None, lambda t: of_rows * t, lambda t: float(t > some), lambda t: 1.3 * t if t > some else of_rows]
    options.update(profile=chance.choice(profiles), cfg=cfg, guided=guided)
    return dict(z=z, z_uncond=free, noise=noise, **options)


@pytest.mark.parametrize("seed", range(3))
def test_draws_are_those_of_the_eager_loop(seed, captured, monkeypatch, diffloss):
    """Also where buffers are not filled, and where an earlier draw has left something in them."""
    head, chance = deepcopy(diffloss), Random(seed)
    for _ in range(20):
        options = random_draw(chance)
        made, expected = head.sample(**options), eagerly(monkeypatch, lambda options=options: head.sample(**options))
        assert made.shape == expected.shape and made.dtype == torch.float32
        torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("some", [None, torch.arange(1, 33, 2)])
def test_a_draw_that_fills_its_buffers_has_the_same_bits(some, solver, captured, monkeypatch, diffloss):
    head, z, free = deepcopy(diffloss), randn(48, WIDTH), randn(48 if some is None else 16, WIDTH, seed=1)
    cfg, tau, m = (randn(48, seed=seed).abs() for seed in (2, 3, 4))
    options = dict(cfg=cfg, tau=tau, num_steps=4, solver=solver, noise=randn(5, 48, CHANNELS, seed=5), clip=CLIP)
    for profile in (None, lambda t: m * t):
        options.update(guided=some, profile=profile)
        expected = eagerly(monkeypatch, lambda: head.sample(z, free, **options))
        assert head.sample(z, free, **options).equal(expected)


def test_what_a_capture_holds_fixed_is_in_its_key(captured, monkeypatch, diffloss):
    """Of equal shapes: the steps where guidance acts, solver, spacing and clipping; values of a profile are not."""
    head, z, free, noise = (
        deepcopy(diffloss),
        randn(16, WIDTH),
        randn(16, WIDTH, seed=1),
        randn(4, 16, CHANNELS, seed=2),
    )
    profiles = [lambda t: float(t > 0.5), lambda t: float(t < 0.5), lambda t: 0.7, lambda t: 0.2]
    others = [dict(solver="ddim"), dict(solver="ddim", spacing="quadratic"), dict(clip=(-1, 1)), dict(clip=None)]
    for options in [*(dict(profile=profile) for profile in profiles), *others] * 2:
        options = {"clip": CLIP, "noise": noise, "num_steps": 3, "cfg": 2.5, **options}
        made, expected = (
            head.sample(z, free, **options),
            eagerly(monkeypatch, lambda o=options: head.sample(z, free, **o)),
        )
        torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)
    assert len(captured) == 7


def test_rows_of_a_bucket_do_not_see_each_other(captured, diffloss):
    """A row that is not finite, of this draw or of an earlier one, changes no other."""
    head, guided = deepcopy(diffloss), torch.tensor([0, 3, 4])
    z, free, noise = randn(20, WIDTH), randn(3, WIDTH, seed=1), randn(4, 20, CHANNELS, seed=2)
    options = dict(cfg=torch.linspace(1, 3, 20), num_steps=3, clip=CLIP, guided=guided)
    expected = head.sample(z, free, noise=noise, **options)
    broken, without = free.clone(), z.clone()
    broken[0], without[1] = torch.nan, torch.inf
    made = head.sample(without, broken, noise=noise, **options)
    assert made[0].isnan().all() and made[1].isnan().any() and made[2:].equal(expected[2:])
    few = head.sample(z[5:10], free, noise=noise[:, 5:10], **{**options, "cfg": torch.ones(5)})
    assert few.isfinite().all()
    assert head.sample(z, free, noise=noise, **options).equal(expected)


def test_few_captures_serve_many_group_sizes(captured, diffloss):
    head, chance = deepcopy(diffloss), Random(0)
    sizes = [chance.randint(1, 300) for _ in range(40)]

    def batch():
        for size in sizes:
            z, noise = randn(size, WIDTH), randn(3, size, CHANNELS, seed=1)
            for free in (None, z):
                head.sample(z, free, 2.0 if free is not None else 1.0, num_steps=2, noise=noise, clip=CLIP)

    batch()
    assert len(captured) == 2 * len({bucket(size) for size in sizes}) <= 20
    batch()
    assert sum(watched.replays for watched in captured) == 160 and len(captured) <= 20


def test_time_is_embedded_once_a_draw(captured, diffloss):
    head, seen = deepcopy(diffloss), []
    head.net.time_embed.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    head.sample(randn(3, WIDTH), num_steps=4, clip=CLIP)
    assert seen == [4] * 3  # warming up, capturing, and the replay, which is a call here


def test_gradients_take_the_eager_loop(captured, diffloss):
    head, z, noise = deepcopy(diffloss), randn(5, WIDTH), randn(3, 5, CHANNELS, seed=1)
    z.requires_grad_()
    drawn = head.sampler(num_steps=2, clip=CLIP).draw(z, None, 1.0, 1.0, noise, 2)
    assert not captured and torch.autograd.grad(drawn.sum(), z)[0].abs().sum() > 0
    rules, options = build_rules("baseline", cfg=2.0), dict(num_iter=3, num_steps=2, seeds=[1, 2])
    decode(tiny_mar(), torch.tensor([0, 1]), rules, **options)
    assert not captured
    generate(tiny_mar(), torch.tensor([0, 1]), rules, **options)
    assert captured


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by", ["autocast", "weights"])
def test_draws_in_half_precision(dtype, by, captured, monkeypatch):
    """Under autocast the weights that it casts are freed when it ends: a graph may not have read them."""
    head = named_weights(DiffLoss(CHANNELS, WIDTH, depth=2, width=16), scale=0.2).eval()
    head.to(dtype if by == "weights" else torch.float32)
    z, free, noise = randn(24, WIDTH), randn(24, WIDTH, seed=1), randn(6, 24, CHANNELS, seed=2)

    def sample():
        with autocast(CPU, dtype if by == "autocast" else torch.float32):
            return head.sample(z, free, torch.linspace(1, 3, 24), 0.9, num_steps=5, noise=noise, clip=CLIP)

    expected = eagerly(monkeypatch, sample)
    for _ in range(2):
        torch.testing.assert_close(sample(), expected, rtol=2e-2, atol=2e-2)
    assert len(captured) == 1 and captured[0].replays == 2


@pytest.mark.parametrize("model", ["mar", "ar"])
def test_images_are_those_of_the_eager_loop_and_the_next_batch_captures_nothing(model, captured, monkeypatch):
    model = tiny_mar() if model == "mar" else tiny_ar("diffusion")
    schedule = dict(cfg_profile="interval", cfg_t_interval="0.3,0.9", temperature=0.9, cfg=1.5)
    rules = build_rules("baseline", **{**model.fixed_rules, **schedule})

    def batch(seeds):
        options = dict(num_steps="4:2", clip=(-2.0, 2.0), seeds=seeds, num_iter=6)
        if model.fixed_rules:
            del options["num_iter"]
        return generate(model, torch.tensor([0, 2, -1]), rules, **options)

    made = batch([1, 2, 3])
    first = len(captured)  # of the token head; passes are captured when they come again
    torch.testing.assert_close(made, eagerly(monkeypatch, lambda: batch([1, 2, 3])), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(batch([4, 5, 6]), eagerly(monkeypatch, lambda: batch([4, 5, 6])), rtol=1e-4, atol=1e-5)
    assert len(model.token_head.graphs.captures) == first > 1


def test_images_of_different_speed(captured, monkeypatch, mar):
    """Ragged groups, images that leave the batch, and a w for each of them."""
    model, sizes = deepcopy(mar), torch.tensor([4.0, 2.0, 1.0])
    rules = replace(ragged_rules(sizes, cfg=2.0), cfg=lambda state, after: (1 + state.images % 2).unsqueeze(1).float())
    made = run(model, rules, LENGTH)
    assert captured
    torch.testing.assert_close(made, eagerly(monkeypatch, lambda: run(model, rules, LENGTH)), rtol=1e-4, atol=1e-5)


def test_a_replay_waits_for_nothing_on_a_device_that_mixes_nothing(monkeypatch, diffloss, capsys):
    """Nor does its capture."""
    chance, draws = Random(3), []
    with pretended(monkeypatch) as waits:
        monkeypatch.setitem(graphs.CAPTURES, DEVICE.type, PlainCalls)
        head = deepcopy(diffloss).to(DEVICE)
        for _ in range(12):
            options = random_draw(chance)
            profile = options.pop("profile", None)
            far = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) and v.dim() else v for k, v in options.items()}
            some = randn(len(options["z"])).abs().to(DEVICE)
            far["profile"] = profile and (lambda t, some=some: some * t)
            draws.append(head.sample(**far))
        assert set(waits) <= {"the test"} and head.graphs.captures and not capsys.readouterr().err
    assert all(near(drawn).isfinite().all() for drawn in draws)
