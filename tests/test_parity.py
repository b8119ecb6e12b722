"""Numerical parity with the published MAR: every array of the fixtures."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion.schedule import cosine_schedule
from heads.policy import build_rules
from models.mar import MAR, MAR_CONFIGS, MARConfig
from sampling.loop import generate
from tests.helpers import named_weights

FIXTURES = Path(__file__).parent / "fixtures"
REFERENCE = np.load(FIXTURES / "mar_reference.npz")
SHAPES = json.loads((FIXTURES / "mar_state_dict_shapes.json").read_text())
NUM_STEPS = 10


def tensor(name):
    return torch.from_numpy(REFERENCE[name])


def close(actual, name, rtol=1e-4, atol=1e-5):
    np.testing.assert_allclose(np.asarray(actual), REFERENCE[name], rtol=rtol, atol=atol)


def close_sample(actual, name):
    """Sampled arrays: largest error 1e-3 of the array's standard deviation, as the fixtures' README states."""
    expected = REFERENCE[name]
    assert actual.shape == expected.shape
    assert np.abs(actual.numpy() - expected).max() <= 1e-3 * expected.std()


@pytest.fixture(scope="module")
def mar():
    config = {key: int(value) for key, value in (item.split("=") for item in REFERENCE["config"])}
    model = MAR(MARConfig(**config, attn_dropout=0.0, proj_dropout=0.0, diffusion_batch_mul=2))
    return named_weights(model).eval()


@pytest.mark.parametrize("name", SHAPES)
def test_published_sizes_have_the_published_keys_and_shapes(name):
    with torch.device("meta"):
        model = MAR(replace(MAR_CONFIGS[name], **SHAPES[name]["args"]))
    ours = {key: list(value.shape) for key, value in model.state_dict().items()}
    published = SHAPES[name]["state_dict"]
    assert ours == published
    assert sum(p.numel() for p in model.parameters()) == SHAPES[name]["params"]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_keys_of_the_reference_model(mar):
    assert sorted(f"{k} {tuple(v.shape)}" for k, v in mar.state_dict().items()) == sorted(REFERENCE["keys"])


def test_patchify_and_back(mar):
    tokens = mar.patchify(tensor("latents"))
    close(tokens, "patchified", rtol=0, atol=0)
    assert torch.equal(mar.unpatchify(tokens), tensor("latents"))


def test_mask_is_the_first_four_fifths_of_each_order():
    order, mask = REFERENCE["orders"], REFERENCE["mask"]
    assert all(mask[i, order[i, : mask[i].sum()]].all() for i in range(len(order)))


@torch.no_grad()
def test_encoder_and_decoder(mar):
    tokens, mask, labels = tensor("patchified"), tensor("mask"), tensor("labels")
    num_visible = int((~mask).sum(1)[0])
    visible = torch.argsort(mask.to(torch.uint8), dim=1, stable=True)[:, :num_visible]
    close(mar.encode(tokens, visible, None, labels), "encoder_out")
    close(mar.encode_decode(tokens, mask, labels), "z")
    close(mar.encode_decode(tokens, mask, None), "z_uncond")
    close(mar.encode_decode(tokens, mask, torch.full_like(labels, -1)), "z_uncond")


def test_schedules():
    close(cosine_schedule().alphas_cumprod, "train_alphas_cumprod", rtol=1e-12, atol=0)
    respaced = cosine_schedule(NUM_STEPS)
    close(respaced.timesteps, "gen_timestep_map", rtol=0, atol=0)
    close(respaced.alphas_cumprod, "gen_alphas_cumprod", rtol=1e-10, atol=0)
    close(respaced.betas, "gen_betas", rtol=1e-10, atol=0)
    close(respaced.posterior_log_variance_clipped, "gen_posterior_log_variance_clipped", rtol=1e-10, atol=0)


def test_training_loss_and_gradients(mar):
    mar.zero_grad()
    tokens, mask = tensor("patchified"), tensor("mask")
    z = mar.encode_decode(tokens, mask, tensor("labels"))
    z, target = z.flatten(0, 1), tokens.flatten(0, 1)
    t, noise = tensor("t"), tensor("noise")
    mse, vb = mar.diffloss.token_loss_terms(target, z, t, noise)
    close(mse.detach(), "train_mse")
    close(vb.detach(), "train_vb")
    loss = mar.diffloss.token_loss(target, z, t, noise)
    close(loss.detach(), "train_loss")
    masked = (loss * mask.flatten()).sum() / mask.sum()
    close(masked.detach(), "masked_loss")
    masked.backward()
    gradients = dict(mar.named_parameters())
    norms = [float(gradients[name].grad.norm()) for name in REFERENCE["grad_names"]]
    close(norms, "grad_norms")
    (other,) = set(gradients) - set(REFERENCE["grad_names"])  # nobody's label was dropped
    assert other == "fake_latent" and gradients[other].grad.norm() == 0


@pytest.mark.parametrize("tag", ["cfg1_tau1", "cfg1_tau0.9", "cfg2.5_tau1", "cfg2.5_tau0.9"])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_ancestral_sampling(mar, tag, as_tensor):
    cfg, tau = (float(part.strip("cfgtau")) for part in tag.split("_"))
    z, z_uncond = tensor("diffloss_z_cond_then_uncond").chunk(2)
    noise = tensor(f"diffloss_sample/{tag}/noise")
    if as_tensor:
        cfg, tau = torch.full((len(z),), cfg), torch.full((len(z),), tau)
    out = mar.diffloss.sample(z, z_uncond, cfg=cfg, tau=tau, num_steps=NUM_STEPS, noise=noise)
    close_sample(out, f"diffloss_sample/{tag}/out")


@pytest.mark.parametrize("tag", ["nocfg", "linear", "constant", "all_steps"])
def test_whole_images(mar, tag):
    settings = dict(item.split("=") for item in REFERENCE[f"sample_tokens/{tag}/settings"])
    draws = tensor(f"sample_tokens/{tag}/noise")
    used = []

    def noise_fn(step, rows):
        start = sum(used)
        used.append((NUM_STEPS + 1) * len(rows))
        assert torch.equal(rows, rows[np.lexsort((rows[:, 1], rows[:, 0]))])  # row-major
        return draws[start : start + used[-1]].reshape(NUM_STEPS + 1, len(rows), -1)

    rules = build_rules(
        "baseline",
        cfg=float(settings["cfg"]),
        cfg_schedule=settings["cfg_schedule"],
        temperature=float(settings["temperature"]),
    )
    out = generate(
        mar,
        tensor("labels"),
        rules,
        num_iter=int(settings["num_iter"]),
        num_steps=NUM_STEPS,
        orders=tensor(f"sample_tokens/{tag}/orders"),
        noise_fn=noise_fn,
    )
    close_sample(out, f"sample_tokens/{tag}/out")
    lengths = REFERENCE[f"sample_tokens/{tag}/noise_rows"]
    assert sum(used) == lengths.sum() == len(draws)
