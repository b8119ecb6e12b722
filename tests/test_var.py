"""VAR's transformer: parity with the published one, block-causality, the cache, sampling, sizes that cannot be."""

from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch

from heads.policy import PolicyHeads, build_rules
from models.celoss import CategoricalSampler
from models.next_scale import kept_tokens
from models.var import VAR, VAR_CONFIGS, VARConfig, filter_logits, next_scale_loss
from models.var_config import read_published
from sampling.loop import generate
from sampling.settings import SampleConfig
from scripts import bench_scales
from tests.helpers_causal import disturbed
from tests.helpers_var import REFERENCE, SHAPES, array, close, fill_by_name, options, shapes, tokenizer
from tests.parity import generate_var, lr_and_wd, no_decay_names
from training.objectives.draws import DrawSettings, training_draws
from training.objectives.token import Batch, TokenObjective
from training.schedules import ScheduleConfig, stage_weights
from training.step import training_step
from util.dist import autocast

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
    assert {name for name, _ in model.named_buffers()} <= set(REFERENCE["var/buffer_keys"].tolist())
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


@torch.no_grad()
def test_loss_and_accuracy_are_reported_of_all_tokens_and_of_the_last_scale():
    model, ids, inputs, labels = tiny(), array("vq/partial4/ids"), array("vq/partial4/inputs"), array("labels")
    draws = training_draws(0, 0, [0, 1], model.token_head, DrawSettings(ENDS[-1], 1.0, 0.0, loss_tokens="all"))
    terms = TokenObjective(model)(Batch(ids, labels, draws, inputs, tail=16), ids.numel())
    logits = model(labels, inputs)
    each, right = -logits.log_softmax(dim=-1).gather(2, ids.unsqueeze(2)).squeeze(2), (logits.argmax(dim=2) == ids)
    expected = dict(loss=each, ce=each, accuracy=right, ce_tail=each[:, -16:], accuracy_tail=right[:, -16:])
    assert terms.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(terms[name], values.float().mean(), msg=name)


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


def test_filters_leave_what_the_published_ones_do():
    for name in REFERENCE:
        if name.startswith("filter/kept_k"):
            top_k, top_p = name.removeprefix("filter/kept_k").split("_p")
            kept = filter_logits(array("filter/logits"), int(top_k), float(top_p))
            assert kept.isfinite().equal(array(name)) and kept[array(name)].equal(array("filter/logits")[array(name)])
    assert filter_logits(array("filter/logits_with_ties"), 4).isfinite().equal(array("filter/kept_with_ties_k4"))
    assert filter_logits(torch.zeros(1, 4), top_p=0.5).isfinite().sum() == 2  # 1/4 + 1/4 <= 1 - p are removed
    assert filter_logits(array("filter/logits"), 900).equal(array("filter/logits"))  # above V: all


@pytest.mark.parametrize("name", ["cos", "lin", "lin0", "lin00", "lin0.8", "exp"])
def test_learning_rate_and_weight_decay(name):
    numbers = dict(peak_lr=3e-4, wd=0.05, wd_end=0.08, warmup_its=10, max_its=200, wp0=0.005, wpe=0.01)
    for it, lr, wd in REFERENCE[f"schedule/{name}"]:
        assert lr_and_wd(int(it), schedule=name, **numbers) == pytest.approx((lr, wd), rel=1e-6)


@pytest.mark.parametrize("block", BLOCKS)
def test_what_has_no_weight_decay(block):
    assert no_decay_names(tiny(block)) == set(REFERENCE[f"var/{block}/no_decay"].tolist())


def test_the_spread_at_the_start():
    torch.manual_seed(0)
    model = VAR(replace(tiny().config, init_adaln_gamma=1e-3))
    parameters = dict(model.named_parameters())
    for name, std, mean in zip(REFERENCE["init/names"], REFERENCE["init/std"], REFERENCE["init/mean"]):
        value = parameters[str(name)].detach()
        assert float(value.std()) == pytest.approx(std, rel=0.3) and float(value.mean()) == pytest.approx(
            mean, abs=0.06
        )
    gates, others = model.blocks[0].ada_lin[1].weight.split([64, 128])
    assert gates.abs().max() < 1e-3 < others.abs().max()


def test_labels_are_dropped_in_training_only():
    model, labels, inputs = tiny(cond_drop_rate=1.0), array("labels"), array("vq/partial4/inputs")
    close(model(labels, inputs), "var/l2/logits")
    close(model.train()(labels, inputs), "var/l2/logits_null")


def test_branches_are_left_out_in_training_only():
    model, inputs = tiny(drop_path_rate=0.9), array("vq/partial4/inputs")
    assert model.drop_rates == [0.0, 0.9]
    logits = model(array("labels"), inputs)
    close(logits, "var/l2/logits")
    torch.manual_seed(0)
    assert not model.train()(array("labels"), inputs).equal(logits)
    first, second = model._kept(torch.zeros(4000, 1, 1))
    assert first.unique().tolist() == [1.0] and second.unique().tolist() == pytest.approx([0.0, 10.0])
    assert second.mean() == pytest.approx(1.0, abs=0.1) and not second[0].equal(second[1])


W = {"ramp": lambda s, i: 1 + 0.5 * s, "some": lambda s, i: 1.5 if (s + i) % 2 else 1.0, "never": lambda s, i: 1.0}


@pytest.mark.parametrize("guided", W)
@torch.no_grad()
def test_the_cache_gives_what_masked_teacher_forcing_gives(guided):
    """Also where guidance comes and goes, and where tokens of some images are known."""
    model, tok, told = tiny(), tokenizer(), []
    rules = build_rules("baseline", order="raster", group="scale")
    rules = replace(rules, cfg=lambda state, after: torch.tensor([[W[guided](state.step, i)] for i in state.images]))
    known = torch.zeros(3, 30, dtype=torch.bool)
    known[1, 10:20], known[2, 14:] = True, True
    draw = CategoricalSampler.draw

    def watch(sampler, z, z_uncond, cfg, tau, noise, num_steps, guided=None, profile=None):
        told.append(sampler._filtered(z, z_uncond, cfg, tau, guided))
        return draw(sampler, z, z_uncond, cfg, tau, noise, num_steps, guided=guided, profile=profile)

    rows = []
    given = dict(tokens=torch.full((3, 30), 5), mask=~known, callback=lambda step, at, *_: rows.append(at))
    with patch.object(CategoricalSampler, "draw", watch):
        ids = generate(model, torch.tensor([0, 3, -1]), rules, 4, seeds=[1, 2, 3], tokenizer=tok, **given)
    inputs = tok.ids_to_inputs(list(ids.split([1, 4, 9, 16], dim=1)))
    labels = torch.tensor([0, 3, 7])
    cond, uncond = model(labels, inputs), model(torch.full_like(labels, 7), inputs)
    for step, (at, logits) in enumerate(zip(rows, told)):
        w = torch.tensor([W[guided](step, i) for i in at[:, 0].tolist()]).unsqueeze(1)
        place = at.unbind(1)
        torch.testing.assert_close(logits, uncond[place] + w * (cond - uncond)[place], rtol=1e-4, atol=1e-4)
    assert (ids[known] == 5).all() and torch.cat(rows).shape[0] == int((~known).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_image_does_not_depend_on_its_batch(dtype):
    """In half precision, under autocast, its ids are those of float32 but for a few ties."""
    rules = build_rules("baseline", order="raster", group="scale", cfg=2.5, cfg_schedule="ramp")
    labels, seeds, options = torch.tensor([0, 3, -1]), [4, 5, 6], dict(tokenizer=tokenizer(), top_k=20, top_p=0.9)
    expected = generate(tiny(), labels, rules, seeds=seeds, **options)
    with autocast(torch.device("cpu"), dtype):
        together = generate(tiny(), labels, rules, seeds=seeds, **options)
        for i in range(3):
            assert generate(tiny(), labels[[i]], rules, seeds=seeds[i : i + 1], **options).equal(together[[i]])
    assert (together == expected).float().mean() > 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_samples_nearly_the_same_ids(dtype):
    rules = build_rules("baseline", order="raster", group="scale", cfg=2.5, cfg_schedule="ramp")
    models = tiny(), tiny().to(dtype)
    ids = [generate(m, torch.tensor([0, 3, -1]), rules, seeds=[4, 5, 6], tokenizer=tokenizer()) for m in models]
    assert (ids[0] == ids[1]).float().mean() > 0.9


def test_untrained_heads_sample_what_the_baseline_does():
    settings = SampleConfig(cfg=2.5, temperature=0.9).fitted(VAR.fixed_rules, "var", 4)
    assert settings.num_iter == 4 and settings.resolved().cfg_schedule == "ramp"
    model, options = tiny(), dict(seeds=[4, 5], tokenizer=tokenizer())
    expected = generate(model, array("labels"), settings.rules(), **options)
    for form in ("bounded", "knots"):
        for scope in ("global", "token"):
            heads = PolicyHeads(32, ("tau", "cfg"), form=form, tau_mode=scope, cfg_mode=scope).eval()
            rules = replace(settings, infer_mode="guidance").rules(heads)
            assert generate(model, array("labels"), rules, **options).equal(expected)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(patch_nums=(4,)), r"patch_nums \(4,\) must be two or more whole numbers"),
        (dict(patch_nums=(1, 3, 2)), "each larger than the one before"),
        (dict(num_heads=7), "embed_dim 1024 must be a multiple of num_heads 7"),
        (dict(img_size=128), "img_size 128 must be 16·16 = 256"),
        (dict(mask_ratio_min=0.5), "mask_ratio_min 0.5 must be 1.0"),
        (dict(drop_path_rate=1.0), "drop_path_rate 1.0 must be below 1"),
        (dict(num_heads=0), "num_heads must be at least 1, got 0"),
        (dict(depth=-1), "depth must be at least 1, got -1"),
    ],
)
def test_sizes_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VARConfig(**options)


@pytest.mark.parametrize("scales", [(1,), (1, 4, 1, 2)])
def test_published_weights_of_another_form_are_refused(scales):
    weights = {**tiny().state_dict(), "blocks.0.attn.scale_mul_1H11": torch.zeros(scales)}
    if len(scales) == 1:
        with pytest.raises(ValueError, match="its tensors have other numbers of dimensions"):
            read_published(weights)
    else:
        with pytest.raises(ValueError, match="4 scales of 30 tokens in all, as no published VAR has"):
            read_published(weights)


def test_the_linear_schedule_of_a_model_of_scales_is_its_ramp():
    """Which other models count in tokens."""
    of_scales = {"order": "raster", "group": "scale", "cfg_base": "ramp"}
    given = SampleConfig(cfg=2.5, cfg_schedule="linear")
    assert given.fitted(of_scales, "var", 4).cfg_schedule == "ramp"
    assert given.fitted({}, "mar", 4).cfg_schedule == "linear"
    assert replace(given, cfg_schedule="constant").fitted(of_scales, "var", 4).cfg_schedule == "constant"


def test_a_stage_trains_the_scales_that_it_has_reached():
    """Stage and weight of iterations of T = 100 with 10 of warm-up, --pg 0.5 --pg0 1 --pgwp 1, 4 scales."""
    config = ScheduleConfig(epochs=10, warmup_epochs=1, pg=0.5, pg0=1, pgwp=1)
    stages = {it: config.stage(it, 100, 10, 4) for it in (0, 9, 19, 20, 21, 24, 39, 40, 50, 99)}
    assert {it: stage for it, (stage, _) in stages.items()} == {
        0: 1, 9: 1, 19: 1, 20: 1, 21: 2, 24: 2, 39: 2, 40: 3, 50: 3, 99: 3
    }  # fmt: skip
    assert stages[20][1] == 1.0 and stages[21][1] == pytest.approx(0.1) and stages[24][1] == pytest.approx(0.4)
    assert stages[39][1] == stages[99][1] == 1.0
    weights = stage_weights(SCALES, 1, 0.3)
    losses = torch.linspace(1, 2, 5)
    assert float((weights * losses).mean()) == pytest.approx(float(losses[0] + 0.3 * losses[1:].sum()) / 30)


@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_the_bench_compares_the_same_samples(cfg, capsys):
    args = bench_scales.BenchScalesArgs(model="var_tiny", batch_size=2, cfg=cfg, device="cpu")
    model, tok = bench_scales.parts(args)
    disturbed(model)
    ids = bench_scales.sample(model, tok, args)
    assert ids.equal(bench_scales.sample(model, tok, args, bench_scales.WholePrefix)) and len(ids.unique()) > 20
    assert bench_scales.main("--model var_tiny --repeats 1".split()) == 0
    assert "| var_tiny |" in capsys.readouterr().out


@pytest.mark.parametrize("extra", ["", "--grad_checkpointing --dtype bf16"])
def test_the_bench_of_training_measures_steps_that_learn(extra, capsys, monkeypatch):
    steps = []

    def watched(state, *rest):
        steps.append(training_step(state, *rest)["loss"])
        assert state.model.training and state.model.config.grad_checkpointing == bool(extra)

    monkeypatch.setattr(bench_scales, "training_step", watched)
    words = "--only training --model var_tiny --batch_size 4 --repeats 2".split()
    assert bench_scales.main([*words, *extra.split()]) == 0
    seconds, memory = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")[1:]
    assert float(seconds) >= 0 and float(memory) > 0.1
    assert len(steps) == 3 and steps[0] == pytest.approx(np.log(4096), rel=0.02) and steps[2] < steps[0]
