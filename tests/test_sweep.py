"""Sweeps of sample.py: which settings a grid has, what tells them apart, that a sweep is its settings one by one."""

import itertools
import json
from dataclasses import replace

import pytest

import main_mar
import sample
from diffusion.solvers import SOLVERS
from heads.policy import PolicyHeads
from models import loading
from sampling.grid import SWEEPS, span
from sampling.settings import SampleConfig
from tests.helpers import named_weights
from tests.test_cli import refused
from tests.test_sample import draw, pngs, rows, train_tiny
from util.checkpoint import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.on_cpu("runs are compared bit for bit, which a GPU promises with --deterministic alone")

SMALL = "--num_images 5 --eval_bsz 3 --num_sampling_steps 2".split()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return train_tiny(tmp_path_factory.mktemp("checkpoint"), "--batch_size", 600)


def test_the_grid_is_the_product_in_the_order_of_the_flags():
    given = dict(seed=[3, 1], order=["halton", "random"], eval_bsz=7, cfg=[1.0, 1.5, 2.0])
    settings = span(given, SampleConfig(num_iter=5, cfg=9.0), {})
    found = [(s.seed, s.sampling.order, s.sampling.cfg) for s in settings]
    assert found == list(itertools.product(given["seed"], given["order"], given["cfg"]))
    assert {s.sampling.num_iter for s in settings} == {5}
    (single,) = span({}, SampleConfig(cfg=9.0), {})
    assert (single.seed, single.sampling.cfg) == (1, 9.0)


def test_a_sweep_is_its_settings_one_by_one(checkpoint, tmp_path, monkeypatch, capsys):
    """One line, one folder, bitwise the same pictures; the checkpoint is read once; a larger grid adds what is new."""
    loads = []
    load = loading.load_model
    monkeypatch.setattr(loading, "load_model", lambda *a, **k: loads.append(a) or load(*a, **k))
    grid = "--cfg 1,2 --num_iter 2,3 --seed 0,1".split()
    assert draw(checkpoint, tmp_path / "swept", *SMALL, *grid) == 0
    assert len(loads) == 1
    swept = {tuple(r["settings"][k] for k in ("cfg", "num_iter", "seed")): r["name"] for r in rows(tmp_path / "swept")}
    assert swept.keys() == set(itertools.product((1.0, 2.0), (2, 3), (0, 1))) and len(set(swept.values())) == 8
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("setting ")]
    assert lines == [f"setting {i} of 8: {name}" for i, name in enumerate(swept.values(), start=1)]

    for point in ((2.0, 2, 1), (1.0, 3, 0)):
        flags = [text for flag, v in zip(("--cfg", "--num_iter", "--seed"), point) for text in (flag, v)]
        assert draw(checkpoint, tmp_path / "alone", *SMALL, *flags) == 0
        name = swept[point]
        assert pngs(tmp_path / "alone" / name) == pngs(tmp_path / "swept" / name)
    assert "setting 1 of" not in capsys.readouterr().out

    sampled, evaluate = [], sample.evaluate
    monkeypatch.setattr(sample, "evaluate", lambda *a, **k: sampled.append(a[1].cfg) or evaluate(*a, **k))
    assert draw(checkpoint, tmp_path / "swept", *SMALL, *grid) == 0
    assert not sampled and len(rows(tmp_path / "swept")) == 8
    assert draw(checkpoint, tmp_path / "swept", *SMALL, *"--cfg 1,1.5,2 --num_iter 2,3 --seed 1,1".split()) == 0
    assert sampled == [1.5, 1.5] and len(rows(tmp_path / "swept")) == 10


def test_modes_are_swept_with_the_heads_of_the_checkpoint(checkpoint, tmp_path):
    """Other heads are other weights, and other pictures of the learned mode only."""
    content = load_checkpoint(checkpoint)
    content["config"]["heads"] = (heads := PolicyHeads(content["config"]["mar"]["decoder_embed_dim"])).settings()
    flags = [*SMALL, "--cfg", 2, "--num_iter", 5, "--infer_mode", "baseline,both"]
    for name in ("a", "b"):
        content["heads_ema"] = content["heads"] = {k: v.clone() for k, v in heads.state_dict().items()}
        save_checkpoint(tmp_path / name, content)
        assert draw(tmp_path / name, tmp_path / "out" / name, *flags) == 0
        named_weights(heads, scale=1.0)  # next: trained ones
    first, second = (rows(tmp_path / "out" / name) for name in ("a", "b"))
    assert [r["settings"]["infer_mode"] for r in first] == ["baseline", "both"]
    assert len({r["weights"] for r in first}) == 1 and first[0]["weights"] != second[0]["weights"]
    pictures = [
        pngs(tmp_path / "out" / name / r["name"]) for name, lines in (("a", first), ("b", second)) for r in lines
    ]
    assert pictures[0] == pictures[1] == pictures[2] != pictures[3]  # untrained heads are the baseline


@pytest.mark.parametrize(
    "flags, shown",
    [
        ("--cfg 1,x", "'x'"),
        ("--cfg 1,-2", "'-2'"),
        ("--num_iter 4,0", "'0'"),
        ("--num_iter 4,,8", "''"),
        ("--order random,nope", "'nope'"),
        ("--infer_mode baseline,nope", "'nope'"),
        ("--infer_mode baseline,policy", "policy"),  # has no heads
        ("--seed 0,1.5", "'1.5'"),
        ("--num_images 5,6", "'5,6'"),  # not to be swept
        ("--cfg 1,2 --metrics fid,nope", "'nope'"),
        ("--cfg 1.5,1.50000001", "too close"),  # folders are named by 6 digits
    ],
)
def test_all_of_a_grid_is_checked_before_any_is_sampled(flags, shown, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sampling.run.generate", lambda *a, **k: pytest.fail("sampling had started"))
    base = ["--checkpoint", str(checkpoint), "--output_dir", str(tmp_path / "out")]
    assert shown in refused(sample.main, [*base, *SMALL, *flags.split()], capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", ["--cfg 1,2", "--num_iter 4,8", "--seed 0,1", "--order random,halton"])
def test_training_takes_no_lists(flags, capsys):
    assert repr(flags.split()[1]) in refused(main_mar.main, [*flags.split(), "--dry_run"], capsys)


def test_a_dry_run_shows_the_lists_and_the_settings(checkpoint, capsys):
    flags = "--cfg 1,2 --order random,halton --num_iter 4 --dry_run".split()
    assert sample.main(["--checkpoint", str(checkpoint), *flags]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["cfg"], shown["order"], shown["num_iter"], shown["seed"]) == ([1, 2], ["random", "halton"], 4, 1)
    assert len(shown["settings"]) == len(set(shown["settings"])) == 4


@pytest.mark.parametrize("flags", [[], ["--fast"], ["--dtype", "bf16"], ["--no_ema", "--class_labels", "3,1"]])
def test_a_dry_run_names_the_folders_of_the_run(checkpoint, tmp_path, capsys, monkeypatch, flags):
    monkeypatch.setattr(sample, "fast_dtype", lambda device, width: "bf16")
    command = [*SMALL, "--cfg", "1,2", "--num_images", "4", "--metrics", "none", *flags]
    capsys.readouterr()
    assert draw(checkpoint, tmp_path, *command, "--dry_run") == 0
    names = json.loads(capsys.readouterr().out)["settings"]
    assert draw(checkpoint, tmp_path, *command) == 0
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == set(names) and len(names) == 2


def test_what_can_be_swept_is_a_flag_of_one_value():
    names = sample.defaults(sample.SampleArgs, SampleConfig)
    assert set(SWEEPS) <= names.keys() and "cfg_interval" not in SWEEPS  # has a comma in it


def test_settings_tell_annealed_steps_and_spacings_apart():
    sampling = SampleConfig(num_sampling_steps="50:5", solver="dpmpp")
    assert sampling.name() == "baseline_iter64_steps50-5_cfg1_solver-dpmpp"
    assert replace(sampling, spacing=SOLVERS["dpmpp"].spacing).resolved() == sampling.resolved()
    assert replace(sampling, spacing="uniform").name() == f"{sampling.name()}_spacing-uniform"
    assert SampleConfig(num_sampling_steps="25").num_sampling_steps == 25  # as older lines of results.jsonl have it
    assert SampleConfig().name() == "baseline_iter64_steps100_cfg1"
    with pytest.raises(ValueError, match="'50:x'"):
        SampleConfig(num_sampling_steps="50:x")
