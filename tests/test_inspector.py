"""The inspector's runs: what is steered and what is not, branches, equal evaluations."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import sample
from sampling.inspector.branching import branch, matched
from sampling.inspector.export import FORMATS
from sampling.inspector.recording import hand_made_rules, record
from sampling.inspector.spec import read_spec
from sampling.inspector.view import beginning, events_of_trace, small
from sampling.run import SamplingRun
from sampling.trace import load_trace
from scripts import inspector
from tests.helpers import untrained
from tests.helpers_inspector import FAMILIES, FREE, QUICK, made, picture, request, tiny_gallery
from util.images.pictures import read_png
from util.sizes import shape_of


@pytest.fixture(scope="module")
def gallery():
    return tiny_gallery()


class Silent:
    """In the place of a trace and of a progress bar."""

    steps = ()

    def record(self, *arguments):
        pass

    set_postfix_str = record


# -------------------------------------------------------------------------------------------------- what it makes


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unsteered_run_is_sample_pys_run(family, gallery):
    spec, recording = made(gallery, family)
    run = SamplingRun(spec.loaded.parts, spec.sampling, spec.labels, spec.seed, None, None)
    assert np.array_equal(recording.images, run.draw_batch(range(2), Silent(), Silent()))
    assert recording.evals == {name: run.evals[name] / 2 for name in ("mar", "mlp")}
    assert (recording.order_step >= 0).all() and recording.steps == list(range(len(recording.events)))
    drawn = [p for event in recording.events for p in event["images"][0]["positions"]]
    assert sorted(drawn) == list(range(spec.loaded.model.config.seq_len))


def test_the_command_that_is_shown_makes_the_same_files(tmp_path, capsys):
    checkpoint = untrained(tmp_path / "run")
    device, dtype = sample.dist.pick_device("cpu"), sample.dist.pick_dtype("fp32", sample.dist.pick_device("cpu"))
    loaded = inspector.load(str(checkpoint), "run", device, dtype)
    settings = {"num_sampling_steps": "3", "num_iter": "3", "cfg": "2", "order": "halton", "tau_schedule": "linear"}
    spec = read_spec({"settings": settings, "labels": [3, -1, 3], "seed": 7}, {"run": loaded})
    words = spec.command().split()
    assert words[:2] == ["python", "sample.py"]
    words[words.index("OUT")] = str(tmp_path / "out")
    assert sample.main(words[2:]) == 0
    recording = record(spec, lambda event: None)
    for i, image in enumerate(recording.images):
        (path,) = (tmp_path / "out").glob(f"*/{i}.png")
        assert np.array_equal(read_png(path), image)


def test_further_draws_show_how_sure_the_head_is_and_change_nothing(gallery):
    plain, asked = made(gallery)[1], made(gallery, sure=2)[1]
    assert np.array_equal(plain.images, asked.images)
    assert np.isnan(plain.maps["sure"]).all() and (asked.maps["sure"] >= 0).all() and asked.maps["sure"].max() > 0
    ids = made(gallery, "ids")[1]
    assert (ids.maps["sure"] < 0).all()  # log p


def test_ranks_are_those_of_the_order(gallery):
    _, recording = made(gallery, settings={"order": "raster"})
    for event in recording.events:
        for item in event["images"]:
            assert item["rank"] == list(range(len(item["positions"])))
    _, recording = made(gallery, "ids", settings={"order": "confidence", "confidence_noise": "0"})
    for event in recording.events:
        for item in event["images"]:
            by_rank = [sure for _, sure in sorted(zip(item["rank"], item["sure"]))]
            assert by_rank == sorted(item["sure"], reverse=True) and sorted(item["rank"])[0] == 0


def test_hand_made_rules_stand_beside_learned_ones(gallery):
    spec, recording = made(gallery, settings={"infer_mode": "both", "cfg": "3"})
    item = recording.events[0]["images"][0]
    assert item["base"]["tau"] == 1 and item["tau"] != [1.0] * len(item["tau"]) and item["logit"][0] is not None
    baseline = read_spec(request(settings={"cfg": "3"}), gallery).sampling.rules()
    assert hand_made_rules(spec.sampling).order is baseline.order
    _, plain = made(gallery, settings={"cfg": "3"})
    for event in plain.events:  # what they say of what they did themselves
        for item in event["images"]:
            assert item["base"]["group"] == len(item["positions"])
            assert item["cfg"] == pytest.approx([item["base"]["cfg"]] * len(item["cfg"]), abs=1e-5)


# ------------------------------------------------------------------------------------------------------- steering


@pytest.mark.parametrize("family", FAMILIES)
def test_before_its_step_a_change_changes_nothing(family, gallery):
    spec, plain = made(gallery, family)
    middle = len(plain.steps) // 2
    _, steered = made(gallery, family, steer=[{"step": middle, "tau": 0.25, "cfg": 1.5, "label": 0}])
    before = (plain.order_step < middle).all(axis=0) if family == "var" else plain.order_step < middle
    for name in ("tau", "cfg"):
        assert np.array_equal(np.where(before, plain.maps[name], 0), np.where(before, steered.maps[name], 0))
    for i in range(middle):
        assert plain.tokens[i].equal(steered.tokens[i])
    later = steered.order_step >= middle
    assert (steered.maps["tau"][later] == 0.25).all() and (steered.maps["cfg"][later] == 1.5).all()
    assert not np.array_equal(plain.images, steered.images)


@pytest.mark.parametrize("family", QUICK)
def test_another_class_from_the_first_step_on_is_that_class(family, gallery):
    _, steered = made(gallery, family, steer=[{"step": 0, "label": 3 if family != "mar" else 0}])
    spec = read_spec(request(family, labels=[3 if family != "mar" else 0] * 2), gallery)
    assert np.array_equal(steered.images, record(spec, lambda event: None).images)


@pytest.mark.parametrize("family", FREE)
def test_painted_tokens_come_at_their_step(family, gallery):
    _, plain = made(gallery, family)
    late = np.flatnonzero(plain.order_step[0] > 1)[-3:].tolist()
    _, steered = made(gallery, family, steer=[{"step": 1, "next": late}])
    assert np.flatnonzero(steered.order_step[0] == 1).tolist() == late
    assert (steered.order_step >= 0).all() and steered.steps == plain.steps


@pytest.mark.parametrize("family", FAMILIES)
def test_a_region_is_made_again_and_the_rest_stays(family, gallery):
    h, w = shape_of(gallery[family].model.config)
    _, plain = made(gallery, family)
    region = [h * w - 2, h * w - 1]
    _, again = made(gallery, family, redo=[{"region": region, "seed": 9}])
    new = again.order_step > plain.steps[-1]
    assert new.any(axis=1).all() and (family == "var" or new.sum() == 4)
    kept = ~new
    assert np.array_equal(plain.tokens[-1].numpy()[kept], again.tokens[-1].numpy()[kept])
    assert len(again.frames) == len(again.steps) > len(plain.steps)


def test_an_upload_is_kept_where_it_is_not_painted(gallery):
    edit = {"image": picture(value=200), "region": list(range(32, 64))}
    _, recording = made(gallery, edit=edit)
    assert (recording.images[:, :4] == 200).all() and not (recording.images[:, 4:] == 200).all()
    assert (recording.order_step[:, :32] == -1).all() and (recording.order_step[:, 32:] >= 0).all()


@pytest.mark.parametrize("family", QUICK)
def test_an_upload_is_kept_where_no_region_is_made_again(family, gallery):
    h, w = shape_of(gallery[family].model.config)
    cells, shape = np.arange(h * w).reshape(h, w), (16, 8) if family == "wide" else (8, 8)
    edit = {"image": picture(shape, value=77), "region": cells[-1:].flatten().tolist()}
    regions = [cells[-1:, -2:].flatten().tolist(), cells[-2:].flatten().tolist()]  # of mar_ar a region is to the end
    redo = [{"region": region, "seed": seed} for seed, region in enumerate(regions)]
    _, once = made(gallery, family, edit=edit, redo=redo[:1])
    _, twice = made(gallery, family, edit=edit, redo=redo)
    side = 8 // h
    for recording, rows in ((once, 1), (twice, 2)):
        assert (recording.images[:, : -rows * side] == 77).all() and (recording.images[:, -rows * side :] != 77).any()
    assert (once.frames[-1][:, :-side] == 77).all()


def test_images_that_are_not_square_keep_their_shape(gallery, tmp_path):
    edit = {"image": picture((16, 8)), "region": list(range(8, 32))}
    spec, recording = made(gallery, "wide", edit=edit)
    assert recording.images.shape == (2, 8, 16, 1) and (recording.images[:, :2] == 200).all()
    assert (recording.order_step[:, :8] == -1).all() and (recording.order_step[:, 8:] >= 0).all()
    (tmp_path / "trace.npz").write_bytes(FORMATS["npz"][0](spec, recording))
    trace = load_trace(tmp_path / "trace.npz")
    for begin in (events_of_trace(trace)[0]["begin"], beginning(spec)["begin"]):
        assert begin["layout"] == [{"rows": 4, "columns": 8, "start": 0}] and begin["img_size"] == "8x16"
    gif = Image.open(io.BytesIO(FORMATS["gif"][0](spec, recording)))
    assert gif.size == (2 * 512 + 8, 256)
    assert small(np.zeros((2, 128, 256, 3), np.uint8)).shape == (2, 32, 64, 3)


def test_a_step_that_keeps_nothing_is_shown_as_such(gallery):
    """Where numbers have left what a float holds, no token is surest."""
    settings = {"infer_mode": "both", "order_base": "confidence", "num_iter": "3", "cfg": "3.4e38"}
    _, recording = made(gallery, "maskgil", settings=settings)
    assert [len(event["images"][0]["positions"]) for event in recording.events] == [0, 0, 16]
    json.dumps(recording.events[-1]["images"], allow_nan=False)  # a page reads no NaN


# -------------------------------------------------------------------------------------------- branches, evaluations


@pytest.mark.parametrize("family", QUICK)
def test_branches_agree_on_what_was_kept(family, gallery):
    spec, recording = made(gallery, family)
    last = spec.sampling.num_iter
    quiet = lambda event: None  # noqa: E731
    assert branch(spec, recording, 1, last, 3, quiet).spread.max() == 0
    whole, late = (branch(spec, recording, 1, step, 4, quiet) for step in (0, last - 1))
    assert len(whole.images) == 4 and whole.spread.mean() > late.spread.mean()
    again = branch(spec, recording, 1, 0, 4, quiet)
    assert np.array_equal(again.images, whole.images)
    if family == "mar":  # whose tokens are pixels
        kept = (recording.order_step[1] < last - 1).reshape(8, 8)
        assert (late.images[:, kept] == recording.images[1][kept]).all() and late.spread[~kept].any()


def test_b_is_given_the_evaluations_of_a(gallery):
    spec, _ = made(gallery, settings={"cfg": "1"})
    tried = []
    changed, evals = matched(spec, {"mar": 9, "mlp": 64 * 12}, tried.append)
    assert evals == {"mar": 9.0, "mlp": 64 * 12} and changed.sampling.num_iter == 9 and tried
    assert changed.sampling.num_sampling_steps == 12
    with pytest.raises(ValueError, match="one"):
        matched(made(gallery, "mar_ar")[0], evals, tried.append)


def test_equal_evaluations_are_those_of_all_images(gallery):
    """Of which some take more than others, under a learned group size."""
    learned = dict(settings={"infer_mode": "policy", "cfg": "2"}, labels=[-1, 1])
    spec, recording = made(gallery, **learned)
    assert matched(spec, recording.evals, lambda event: None)[1] == recording.evals


@pytest.mark.slow
def test_evaluations_out_of_reach_are_met_as_nearly_as_can_be(gallery):
    spec, _ = made(gallery, labels=[1], settings={"cfg": "1"})
    changed, evals = matched(spec, {"mar": 5000, "mlp": 1}, lambda event: None)
    assert evals["mar"] == 64 and changed.sampling.num_iter <= 256  # a step a token


def test_settings_without_steering_have_no_wrapper_of_their_own(gallery):
    """The same rules answer, whether somebody watches or not."""
    spec, recording = made(gallery)
    again = record(replace(spec, changes=()), lambda event: None, frames=False)
    assert np.array_equal(again.images, recording.images) and again.frames == [None] * 4
