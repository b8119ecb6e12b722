"""Guidance over the diffusion steps, w(t) = 1 + (w − 1)·m(t): what profiles are equal to, cost, and refuse."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffusion.schedule import NUM_TRAIN_STEPS, cosine_schedule
from diffusion.solvers import SOLVERS
from heads.schedules import interpolate
from sampling.loop import generate
from tests.helpers_diffusion import CLIP, NUM_STEPS, N, inputs
from tests.helpers_generate import BATCH, LABELS, LENGTH, SCHEDULE, SEEDS, ragged_rules, rules_of, run
from tests.test_diffloss_sample import HostReads
from tests.test_families import next_scale


def with_profile(m, **kwargs):
    """Baseline rules, m(share, state) at each diffusion step."""
    return replace(rules_of(**{"cfg": 2.0, **kwargs}), profile=lambda state: lambda share: m(share, state))


def rows_seen(net, call):
    """(result of call(), rows of each call of the network)."""
    rows = []
    hook = net.register_forward_hook(lambda net, args, out: rows.append(len(out)))
    try:
        return call(), rows
    finally:
        hook.remove()


# ------------------------------------------------------------------------------------------------------- equivalences


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("cfg", [2.0, torch.tensor([1.0, 3.0, 0.0, 0.5, 2.0])])
def test_a_profile_of_ones_is_none_and_of_zeros_no_guidance(cfg, solver, diffloss):
    z, z_uncond, noise = inputs()
    common = dict(num_steps=NUM_STEPS, noise=noise, solver=solver, clip=CLIP)
    none = diffloss.sample(z, z_uncond, cfg, **common)
    for one in (1.0, torch.ones(N), torch.ones(N, 1)):
        assert torch.equal(diffloss.sample(z, z_uncond, cfg, profile=lambda share, m=one: m, **common), none)
    plain, rows = rows_seen(
        diffloss.net, lambda: diffloss.sample(z, z_uncond, cfg, profile=lambda share: 0.0, **common)
    )
    assert torch.equal(plain, diffloss.sample(z, **common)) and rows == [N] * NUM_STEPS
    torch.testing.assert_close(
        diffloss.sample(z, z_uncond, cfg, profile=lambda share: torch.zeros(N), **common), plain, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("some", [None, torch.tensor([1, 4])])
def test_a_constant_profile_is_another_scale(some, diffloss):
    """w(t) = 1 + (w − 1)·m of each row, where guidance acts on all rows and where it does on some."""
    z, z_uncond, noise = inputs()
    cfg, m = torch.tensor([2.0, 3.0, 2.0, 1.5, 0.5]), torch.tensor([0.5, 1.0, 2.0, 0.0, 1.5])
    if some is not None:
        z_uncond, cfg = z_uncond[some], torch.ones(N).index_copy(0, some, cfg[some])
    common = dict(num_steps=NUM_STEPS, noise=noise, clip=CLIP, guided=some)
    expected = diffloss.sample(z, z_uncond, 1 + (cfg - 1) * m, **common)
    torch.testing.assert_close(diffloss.sample(z, z_uncond, cfg, profile=lambda share: m, **common), expected)


def test_a_profile_is_asked_at_the_timesteps_and_decides_at_each(diffloss):
    """m = 0 but at one timestep: guidance at that one alone, in rows and in the result."""
    z, z_uncond, noise = inputs()
    shares = (cosine_schedule(NUM_STEPS).timesteps / NUM_TRAIN_STEPS)[::-1]
    results = []
    for place, only in enumerate(shares):
        asked = []
        out, rows = rows_seen(
            diffloss.net,
            lambda only=only, asked=asked: diffloss.sample(
                z, z_uncond, 3.0, num_steps=NUM_STEPS, noise=noise, clip=CLIP,
                profile=lambda share: asked.append(share) or float(share == only),
            ),
        )  # fmt: skip
        assert asked == list(shares) and rows == [N + N * (i == place) for i in range(NUM_STEPS)]
        results.append(out)
    assert not any(torch.allclose(a, b, atol=1e-5) for a, b in zip(results, results[1:]))


def test_a_profile_of_another_length_is_one_line(diffloss):
    z, z_uncond, noise = inputs()
    with pytest.raises(ValueError, match=f"profile must be a number or one for each of the {N} rows, got {N + 1}"):
        diffloss.sample(z, z_uncond, 2.0, num_steps=NUM_STEPS, noise=noise, profile=lambda share: torch.ones(N + 1))


# ----------------------------------------------------------------------------------------------------------- the loop


@pytest.mark.parametrize("schedule", ["constant", "linear", "interval"])
def test_in_the_loop_ones_are_none_and_zeros_are_no_guidance(mar, schedule):
    options = dict(cfg_schedule=schedule, cfg_interval="0.2,0.7")
    none, plain = run(mar, rules_of(cfg=2.0, **options), 4), run(mar, rules_of(), 4)
    whole = rules_of(cfg=2.0, cfg_profile="interval", cfg_t_interval="0,1", **options)
    for rules in (whole, with_profile(lambda share, state: 1.0, **options)):
        assert torch.equal(run(mar, rules, 4), none)
    assert torch.equal(run(mar, with_profile(lambda share, state: 0.0, **options), 4), plain)
    part = run(mar, rules_of(cfg=2.0, cfg_profile="interval", cfg_t_interval="0.3,0.9", **options), 4)
    assert not torch.allclose(part, none, atol=1e-3) and not torch.allclose(part, plain, atol=1e-3)


@pytest.mark.parametrize("dims", [1, 2])
def test_the_tensor_of_a_profile_has_a_number_for_each_image_looked_at(mar, dims):
    """Images of different speed, so that some leave the batch: each is as it is alone under its own m."""
    sizes, m = torch.tensor([4.0, 2.0, 1.0]), torch.tensor([0.5, 0.0, 1.5])

    def of_image(share, state):
        return m[state.images].reshape(-1, *[1] * (dims - 1)) * share

    rules = replace(ragged_rules(sizes, cfg=2.0), profile=lambda state: lambda share: of_image(share, state))
    together = run(mar, rules, LENGTH)
    for i in range(BATCH):
        alone = replace(
            ragged_rules(sizes[i : i + 1], cfg=2.0),
            profile=lambda state, i=i: lambda share: torch.full((len(state.images),), m[i].item()) * share,
        )
        torch.testing.assert_close(
            together[i : i + 1], run(mar, alone, LENGTH, LABELS[i : i + 1], SEEDS[i : i + 1]), rtol=1e-4, atol=1e-5
        )


def test_a_head_without_diffusion_steps_refuses_a_profile():
    model, rules, num_iter = next_scale(1)
    generate(model, LABELS, rules, num_iter, 1, SEEDS)
    rules = replace(rules, profile=lambda state: lambda share: 1.0)
    with pytest.raises(ValueError, match="--cfg_profile must be constant"):
        generate(model, LABELS, rules, num_iter, 1, SEEDS)


def test_nothing_waits_for_the_device_on_account_of_a_profile(diffloss):
    z, z_uncond, noise = inputs()
    cfg, m = torch.linspace(0, 2, N), torch.linspace(0, 1, N)
    with HostReads() as reads:
        for profile in (lambda share: m * share, lambda share: float(share > 0.5)):
            for some in (None, torch.tensor([1, 3])):
                rows = z_uncond if some is None else z_uncond[:2]
                diffloss.sample(z, rows, cfg, num_steps=NUM_STEPS, noise=noise, guided=some, profile=profile)
    assert reads.seen == []


@pytest.mark.parametrize("options", [dict(schedule=SCHEDULE), dict(cfg_profile="interval", cfg_t_interval="0.2,0.6")])
def test_a_step_copies_to_the_host_once(mar, options, monkeypatch):
    """The plan, for whose rows shapes are needed; nothing besides on account of schedules and profiles."""
    copies, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(self.shape) or cpu(self))
    run(mar, rules_of(cfg=2.0, **options), 4)
    assert copies == [(2, BATCH, LENGTH)] * 4


# -------------------------------------------------------------------------------------------------------------- knots


def test_knots_are_interpolated_linearly():
    knots = np.array([0.5, 2.0, 0.0, 1.0])
    shares = np.linspace(0, 1, 50)
    got = [interpolate(knots, share) for share in shares]
    np.testing.assert_allclose(got, np.interp(shares, np.linspace(0, 1, 4), knots), rtol=1e-12)
    for array in (knots, torch.tensor(knots)):
        assert [float(interpolate(array, i / 3)) for i in range(4)] == knots.tolist()  # exact at the knots
        assert (float(interpolate(array, -1.0)), float(interpolate(array, 2.0))) == (0.5, 1.0)
    level = np.full(8, 0.1)
    assert all(interpolate(level, share) == 0.1 for share in shares)  # and between equal ones
    assert interpolate(np.array([3.0]), 0.7) == 3.0


def test_knots_have_gradients():
    knots = torch.rand(2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda knots: interpolate(knots, 0.33), (knots,))
    assert interpolate(knots, 0.33).shape == (2,)
