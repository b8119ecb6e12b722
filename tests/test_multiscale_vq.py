"""VAR's tokenizer: parity with the published one, its keys and parameters, and which φ serves which scale."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from models.tokenizers.multiscale_quantizer import phi_index
from models.tokenizers.multiscale_vq import MultiScaleVQ, MultiScaleVQConfig
from tests.helpers_tokenizers import message
from tests.helpers_var import REFERENCE, SHAPES, STATISTICS, VARIANTS, array, close, shapes, tokenizer


def test_encoder_and_features():
    with torch.no_grad():
        close(tokenizer().encoder(array("image")), "vq/encoder_out")
        close(tokenizer().encode_features(array("image")), "vq/f")


@pytest.mark.parametrize("variant", VARIANTS)
def test_ids_sums_and_inputs(variant):
    """Of each arrangement of φ; with and without codes and vectors divided by their length."""
    tok = tokenizer(variant)
    ids = tok.features_to_ids(array("vq/f"))
    assert [tuple(scale.shape) for scale in ids] == [(2, p * p) for p in (1, 2, 3, 4)]
    assert torch.equal(torch.cat(ids, dim=1), array(f"vq/{variant}/ids"))
    with torch.no_grad():
        close(torch.stack(tok.ids_to_features(ids)), f"vq/{variant}/f_hats")
        inputs = tok.ids_to_inputs(ids)
        close(inputs, f"vq/{variant}/inputs")
        assert torch.equal(tok.ids_to_inputs(ids[:2]), inputs[:, : 4 + 9])  # no later scale is looked at
    quantize = {key: list(value.shape) for key, value in tok.state_dict().items() if key.startswith("quantize.")}
    assert quantize == shapes(f"vq/{variant}/quantize_keys")
    if variant != "nophi":
        assert list(tok.quantize.phi_index) == REFERENCE[f"vq/{variant}/phi_index"].tolist()
    assert torch.equal(torch.cat(tok.encode(array("image")), dim=1), array(f"vq/{variant}/ids"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_and_its_gradients(variant):
    """The encoder learns from the commitment, codes and φ from the rest; f̂ passes its gradient to f alone."""
    tok = tokenizer(variant)
    tok.zero_grad()
    f = array("vq/f").requires_grad_()
    f_hat, loss = tok.quantize_loss(f)
    close(loss, f"vq/{variant}/vq_loss")
    loss.backward()
    close(f.grad, f"vq/{variant}/grad_f")
    close(tok.quantize.embedding.weight.grad, f"vq/{variant}/grad_embedding")
    gradients = {name: float(p.grad.norm()) for name, p in tok.quantize.named_parameters()}
    names = REFERENCE[f"vq/{variant}/quantize_grad_names"].tolist()
    assert set(names) == gradients.keys()
    norms = [gradients[name] for name in names]
    np.testing.assert_allclose(norms, REFERENCE[f"vq/{variant}/quantize_grad_norms"], rtol=2e-3, atol=1e-5)


def test_f_hat_is_straight_through():
    """Its value is that of the last sum, its gradient that of f: neither codes nor φ learn from the pixels."""
    tok = tokenizer()
    tok.zero_grad()
    f = array("vq/f").requires_grad_()
    f_hat, _ = tok.quantize_loss(f)
    np.testing.assert_allclose(f_hat.detach(), REFERENCE["vq/partial4/f_hats"][-1], rtol=1e-4, atol=1e-4)
    f_hat.sum().backward()
    assert torch.equal(f.grad, torch.ones_like(f))
    assert all(parameter.grad is None for parameter in tok.quantize.parameters())


def test_the_training_forward():
    tok = tokenizer().train()
    tok.zero_grad()
    reconstruction, vq_loss = tok(array("image"))
    tok.eval()
    close(reconstruction, "vq/reconstruction")
    loss = F.mse_loss(reconstruction, array("image")) + vq_loss
    close(loss, "vq/train_loss")
    loss.backward()
    gradients = {name: float(p.grad.norm()) for name, p in tok.named_parameters()}
    norms = [gradients.pop(name) for name in REFERENCE["vq/train_grad_names"].tolist()]
    np.testing.assert_allclose(norms, REFERENCE["vq/train_grad_norms"], rtol=2e-3, atol=1e-5)
    assert not gradients


def test_the_published_ten_scales():
    """Area windows overlap, and two scales are as near to one φ as to another."""
    tok = tokenizer(v_patch_nums=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
    ids = tok.features_to_ids(array("vq/ten_scales/f"))
    assert torch.equal(torch.cat(ids, dim=1), array("vq/ten_scales/ids"))
    with torch.no_grad():
        close(torch.stack(tok.ids_to_features(ids)), "vq/ten_scales/f_hats")
        close(tok.ids_to_inputs(ids), "vq/ten_scales/inputs")


@pytest.mark.parametrize("name", [name for name in REFERENCE.files if name.startswith("phi_index/")])
def test_which_phi_serves_which_scale(name):
    num_phis, num_scales = map(int, name.removeprefix("phi_index/K").split("_scales"))
    assert list(phi_index(num_phis, num_scales)) == REFERENCE[name].tolist()


def test_phi_where_two_are_as_near():
    """The tables of the specification, whose scales 2 and 7 of ten, and 2 of five, are ties that rounding decides."""
    assert phi_index(4, 10) == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
    assert phi_index(4, 5) == (0, 1, 2, 2, 3)
    assert phi_index(4, 14) == (0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3)
    assert phi_index(3, 4) == (0, 0, 1, 2)


def test_the_published_size_has_the_published_keys_shapes_and_count():
    published = SHAPES["vae_ch160v4096z32"]
    with torch.device("meta"):
        tok = MultiScaleVQ(MultiScaleVQConfig(**published["arguments"]))
    own = {key: list(value.shape) for key, value in tok.state_dict().items()}
    assert own == published["shapes"] and len(own) == 324
    assert sum(p.numel() for p in tok.parameters()) == published["parameters"] == 108_948_355
    assert [name for name, _ in tok.named_buffers()] == [STATISTICS]


def test_scales_may_be_heights_and_widths():
    """When encoding; the last ones are those of the features."""
    tok, f = tokenizer(), array("vq/f")
    pairs = tok.features_to_ids(f, scales=[(p, p) for p in (1, 2, 3, 4)])
    assert torch.equal(torch.cat(pairs, dim=1), array("vq/partial4/ids"))
    wide = torch.cat([f, f[..., :2]], dim=3)
    sizes = [(1, 1), (2, 3), (3, 5), (4, 6)]
    assert [tuple(ids.shape) for ids in tok.features_to_ids(wide, scales=sizes)] == [(2, 1), (2, 6), (2, 15), (2, 24)]
    for wrong in (None, sizes[1:], [1, 2, 3, 4]):
        assert "the last one that of the features (4, 6)" in message(tok.features_to_ids, wide, scales=wrong)


def test_autocast_changes_nothing_in_the_quantiser():
    tok, f = tokenizer(), array("vq/f")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(torch.cat(tok.features_to_ids(f), dim=1), array("vq/partial4/ids"))
        f_hat, loss = tok.quantize_loss(f)
        close(loss, "vq/partial4/vq_loss", rtol=1e-6)
        close(tok.ids_to_inputs(tok.features_to_ids(f)), "vq/partial4/inputs")
    assert f_hat.dtype == torch.float32


def test_codes_in_place_of_ids_add_the_same():
    tok, ids = tokenizer().quantize, torch.arange(9).repeat(2, 1)
    with torch.no_grad():
        assert torch.equal(tok.embed_vectors(tok.embedding(ids), 2), tok.embed(ids, 2))
        assert torch.equal(tok.next_input(array("vq/f"), 3), array("vq/f").flatten(2).mT)


@pytest.mark.parametrize(
    "changes", [dict(v_patch_nums=(4,)), dict(v_patch_nums=(2, 2)), dict(ch=40), dict(quant_resi=float("nan"))], ids=str
)
def test_sizes_that_cannot_be_are_one_line(changes):
    assert str(list(changes)[0]) in message(MultiScaleVQConfig, **changes)


def test_names_of_tensors_and_buffers():
    tok = tokenizer()
    assert {key: list(value.shape) for key, value in tok.state_dict().items()} == shapes("vq/keys")
    assert [name for name, _ in tok.named_buffers()] == REFERENCE["vq/buffer_keys"].tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_left_after_each_scale(variant):
    tok, f = tokenizer(variant), array("vq/f")
    with torch.no_grad():
        f_hats = torch.stack(tok.ids_to_features(tok.features_to_ids(f)))
    close((f_hats - f).square().mean(dim=(1, 2, 3, 4)).double(), f"vq/{variant}/scale_mse")


def test_the_running_mean_of_hits_is_the_published_one_of_a_step_that_counts_scales():
    """The published counter goes on with each scale, ours with each step: scale s of step k is its number 4k + s."""
    tok, f = tokenizer(), array("vq/f")
    published = array("vq/hits_after_f_times_1_half_minus1_then_2")
    ids = [tok.features_to_ids(factor * f) for factor in (1, 0.5, -1, 2)]
    for scale in range(4):
        tok.quantize.ema_vocab_hit_SV.zero_()
        for number, (first, chosen) in enumerate(zip((0, 4, 8, 100), ids)):  # the counter was set to 100 for the last
            tok.quantize.count(chosen, first + scale)
            torch.testing.assert_close(tok.quantize.ema_vocab_hit_SV[scale], published[number, scale])
    threshold = 0.08 * tok.quantize.num_tokens[-1] * len(f) / len(tok.quantize.embedding.weight)
    used = (published[0] >= threshold).float().mean(dim=1)  # the last scale's, for all scales
    np.testing.assert_allclose(100 * used, REFERENCE["vq/usages_percent"])
