"""VAR's transformer: parity with the published one, block-causality, the cache, sampling, sizes that cannot be."""

import numpy as np
import pytest
import torch

from models.next_scale import kept_tokens
from models.var import VAR, VAR_CONFIGS, VARConfig, next_scale_loss
from tests.helpers_var import REFERENCE, SHAPES, array, close, fill_by_name, options, shapes, tokenizer
from tests.parity import generate_var

BLOCKS = ("l2", "plain", "l2_shared", "plain_shared")
SCALES = (1, 2, 3, 4)
ENDS = (1, 5, 14, 30)


def tiny(block="l2", **changes) -> VAR:
    sizes = {**options("var_config"), **options(f"var/{block}/options"), "patch_nums": SCALES}
    return fill_by_name(VAR(VARConfig(**{**sizes, "vocab_size": 64, "z_channels": 8, **changes}))).eval()


@pytest.mark.parametrize("name", [name for name in SHAPES if name.startswith("var")])
def test_published_sizes_have_the_published_keys_and_shapes(name):
    with torch.device("meta"):
        model = VAR(VAR_CONFIGS[name])
    assert model.config == VARConfig(**SHAPES[name]["arguments"])
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == SHAPES[name]["shapes"]
    assert sum(p.numel() for p in model.parameters()) == SHAPES[name]["parameters"]
    assert sorted(dict(model.named_buffers())) == sorted(SHAPES[name]["buffers"])


@pytest.mark.parametrize("block", BLOCKS)
def test_forward_loss_and_gradients(block):
    model, ids, labels, inputs = tiny(block), array("vq/partial4/ids"), array("labels"), array("vq/partial4/inputs")
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == shapes(f"var/{block}/keys")
    seen = []
    for each in model.blocks:
        each.register_forward_hook(lambda block, args, out: seen.append(out))
    close(model.embed(labels, inputs), "var/sequence")
    logits = model(labels, inputs)
    close(torch.stack(seen), f"var/{block}/block_outputs")
    close(logits, f"var/{block}/logits")
    close(model(torch.full_like(labels, 7), inputs), f"var/{block}/logits_null")
    close(model.head.logits(model.encode_decode(inputs)), f"var/{block}/logits_null")
    close(next_scale_loss(logits, ids, SCALES), f"var/{block}/loss_smooth0")
    loss = next_scale_loss(logits, ids, SCALES, 0.1)
    close(loss, f"var/{block}/loss_smooth0.1")
    model.head.label_smoothing = 0.1
    prediction = model.head.predict(None, model.encode_decode(inputs, labels=labels).flatten(0, 1), {})
    each = model.head.losses(prediction, ids.flatten(), {})["ce"]
    close(each.unflatten(0, (2, 30)), f"var/{block}/token_loss_smooth0.1")
    parameters = dict(model.named_parameters())
    assert set(parameters) == set(REFERENCE[f"var/{block}/grad_names"].tolist())
    gradients = torch.autograd.grad(loss, [parameters[str(name)] for name in REFERENCE[f"var/{block}/grad_names"]])
    norms = [float(g.norm()) for g in gradients]
    np.testing.assert_allclose(norms, REFERENCE[f"var/{block}/grad_norms"], rtol=2e-3, atol=1e-5)


def test_buffers_of_the_mask():
    model = tiny()
    assert model.lvl_1L.equal(array("var/lvl_1L"))
    assert (model.attn_bias_for_masking[0, 0] == 0).equal(array("var/attention_allowed"))
    close(model.lvl_embed(model.lvl_1L) + model.pos_1LC, "var/level_plus_position")


@torch.no_grad()
def test_the_first_scales_give_their_logits_and_stages_their_losses():
    model, ids, inputs = tiny(), array("vq/partial4/ids"), array("vq/partial4/inputs")
    for stage, weight, expected in REFERENCE["var/l2/stage_losses_smooth0.1"]:
        num = ENDS[int(stage)]
        logits = model(array("labels"), inputs[:, : num - 1])
        np.testing.assert_allclose(logits.numpy(), REFERENCE["var/l2/logits"][:, :num], rtol=1e-4, atol=1e-4)
        loss = next_scale_loss(logits, ids[:, :num], SCALES, 0.1, int(stage), weight)
        assert float(loss) == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_a_token_changes_no_scale_up_to_its_own():
    model, tok, ids = tiny(), tokenizer(), array("vq/partial4/ids")
    whole = model(array("labels"), tok.ids_to_inputs(list(ids.split([1, 4, 9, 16], dim=1))))
    for place in (0, 3, 7, 20):
        other = ids.clone()
        other[0, place] = (other[0, place] + 1) % 64
        logits = model(array("labels"), tok.ids_to_inputs(list(other.split([1, 4, 9, 16], dim=1))))
        changed = (logits != whole).any(dim=2)
        end = next(end for end in ENDS if place < end)
        assert not changed[0, :end].any() and changed[0, end:].all() and not changed[1].any()


SAMPLES = [key.removesuffix("/settings") for key in REFERENCE if key.startswith("var/") and key.endswith("/settings")]


@pytest.mark.parametrize("place", SAMPLES)
def test_samples(place):
    _, block, tag = place.split("/")
    settings, tok, told = options(f"{place}/settings"), tokenizer(), []
    greedy, smooth = tag.startswith("greedy"), settings.pop("smooth")
    if not greedy:
        noise = array(f"{place}/noise").split([1, 4, 9, 16], dim=1)
        settings["noise_fn"] = lambda s: noise[s]
    record = dict(callback=lambda s, logits, ids, f_hat: told.append((s, logits, ids, f_hat)))
    images, ids = generate_var(tiny(block), tok, array("labels"), greedy=greedy, smooth=smooth, **settings, **record)
    scales, logits, given, f_hats = zip(*told)
    assert scales == (0, 1, 2, 3) and torch.cat(given, 1).equal(torch.cat(ids, 1))
    tolerance = 1e-2 if smooth else 2e-4
    close(torch.cat(logits, 1), f"{place}/logits", tolerance, tolerance)
    close(torch.stack(f_hats), f"{place}/f_hats", tolerance, tolerance)
    if not smooth:
        assert torch.cat(ids, 1).equal(array(f"{place}/ids"))
    if f"{place}/image" in REFERENCE:
        close((images + 1) / 2, f"{place}/image", *[max(tolerance, 3e-4)] * 2)


def test_kept_tokens_and_edited_samples():
    keep, place, told = array("var/l2/edit/keep_mask"), "var/l2/edit", []
    assert kept_tokens(keep, SCALES).equal(array(f"{place}/keep_tokens"))
    y0, x0, y1, x1 = (REFERENCE[f"{place}/box_y0x0y1x1"] * 4).round().astype(int)
    box = torch.ones(4, 4)
    box[y0:y1, x0:x1] = 0
    assert box.equal(keep)
    source = array("vq/partial4/ids")
    record = dict(callback=lambda s, logits, ids, f_hat: told.append((logits, f_hat)))
    _, ids = generate_var(tiny(), tokenizer(), array("labels"), greedy=True, keep_ids=source, keep_mask=keep, **record)
    logits, f_hats = zip(*told)
    close(torch.cat(logits, 1), f"{place}/logits", 2e-4, 2e-4)
    close(torch.stack(f_hats), f"{place}/f_hats", 2e-4, 2e-4)
    predicted = array(f"{place}/predicted_ids")
    assert torch.cat(ids, 1).equal(torch.where(array(f"{place}/keep_tokens"), source, predicted))
