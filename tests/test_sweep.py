"""Sweeps of sample.py: which settings a grid has, what each costs in network evaluations, the table of them."""

import csv
import itertools
import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import main_mar
import sample
from diffusion.solvers import SOLVERS
from engine_mar import generate, sample_images
from heads.policy import PolicyHeads, SampleConfig, build_rules
from models.tokenizers import build_tokenizer
from scripts import make_table
from tests.helpers import named_weights, tiny_mar
from tests.test_cli import refused
from tests.test_sample import draw, pngs, rows, train_tiny
from util.checkpoint import load_checkpoint, save_checkpoint

SMALL = "--num_images 5 --eval_bsz 3 --num_sampling_steps 2".split()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return train_tiny(tmp_path_factory.mktemp("checkpoint"), "--batch_size", 600)


# ------------------------------------------------------------------------------------------------------------ the grid


def test_the_grid_is_the_product_in_the_order_of_the_flags():
    given = dict(seed=[3, 1], order=["halton", "random"], eval_bsz=7, cfg=[1.0, 1.5, 2.0])
    settings = sample.span(given, dict(num_iter=5, cfg=9.0))
    found = [(s.seed, s.sampling.order, s.sampling.cfg) for s in settings]
    assert found == list(itertools.product(given["seed"], given["order"], given["cfg"]))
    assert {s.sampling.num_iter for s in settings} == {5}
    (single,) = sample.span({}, dict(cfg=9.0))
    assert (single.seed, single.sampling.cfg) == (0, 9.0)


def test_a_sweep_is_its_settings_one_by_one(checkpoint, tmp_path, monkeypatch, capsys):
    """One line, one folder, bitwise the same pictures; the checkpoint is read once; a larger grid adds what is new."""
    loads = []
    load = sample.load_mar
    monkeypatch.setattr(sample, "load_mar", lambda *a, **k: loads.append(a) or load(*a, **k))
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
    monkeypatch.setattr(sample, "evaluate", lambda *a, **k: sampled.append(a[2].cfg) or evaluate(*a, **k))
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
    monkeypatch.setattr("engine_mar.generate", lambda *a, **k: pytest.fail("sampling had started"))
    base = ["--checkpoint", str(checkpoint), "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    assert shown in refused(sample.main, [*base, *SMALL, *flags.split()], capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", ["--cfg 1,2", "--num_iter 4,8", "--seed 0,1", "--order random,halton"])
def test_training_takes_no_lists(flags, capsys):
    assert repr(flags.split()[1]) in refused(main_mar.main, [*flags.split(), "--dry_run"], capsys)


def test_a_dry_run_shows_the_lists_and_the_settings(checkpoint, capsys):
    flags = "--cfg 1,2 --order random,halton --num_iter 4 --dry_run".split()
    assert sample.main(["--checkpoint", str(checkpoint), *flags]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["cfg"], shown["order"], shown["num_iter"], shown["seed"]) == ([1, 2], ["random", "halton"], 4, 0)
    assert len(shown["settings"]) == len(set(shown["settings"])) == 4


def test_what_can_be_swept_is_a_flag_of_one_value():
    names = sample.defaults(sample.SampleArgs, SampleConfig)
    assert set(sample.SWEEPS) <= names.keys() and "cfg_interval" not in sample.SWEEPS  # has a comma in it


# ------------------------------------------------------------------------------------------------ network evaluations


def tiny_heads() -> PolicyHeads:
    """Heads that disagree between images: ragged groups, a w for each token."""
    return named_weights(PolicyHeads(16, cfg_mode="token", rho=(0.05, 0.6), tau=(0.5, 1.5)), scale=0.1).eval()


def counted(mar, **kwargs) -> tuple[Counter, Counter]:
    """(what generate() says, what the networks saw), for four images of which two have known tokens already."""
    mask = torch.ones(4, mar.config.seq_len, dtype=torch.bool)
    mask[1, 5:], mask[2, 20:] = False, False  # these finish early
    said, seen = Counter(), Counter()
    encode_decode, net = mar.encode_decode, mar.diffloss.net.forward

    def transformer(tokens, *args):
        seen["mar"] += len(tokens)
        return encode_decode(tokens, *args)

    def mlp(x, *args):
        seen["mlp"] += len(x)
        return net(x, *args)

    mar.encode_decode, mar.diffloss.net.forward = transformer, mlp
    try:
        tokens = torch.zeros(*mask.shape, mar.config.token_dim)
        generate(mar, [0, 1, 2, 0], seeds=range(4), evals=said, tokens=tokens, mask=mask, **kwargs)
    finally:
        del mar.encode_decode, mar.diffloss.net.forward
    return said, seen


@pytest.mark.parametrize("schedule", ["constant", "linear", "interval"])
@pytest.mark.parametrize("num_iter, num_steps, cfg", [(1, 2, 1.0), (1, 2, 2.0), (4, 3, 2.0), (70, 1, 2.0), (5, 2, 1.0)])
def test_evaluations_said_are_those_made(schedule, num_iter, num_steps, cfg):
    rules = build_rules("baseline", cfg=cfg, cfg_schedule=schedule, cfg_interval="0.2,0.7")
    said, seen = counted(tiny_mar(), rules=rules, num_iter=num_iter, num_steps=num_steps)
    assert said == seen and seen["mlp"] >= num_steps * 89  # 64 + 5 + 20 tokens at least


def test_guidance_is_computed_for_the_images_and_tokens_it_acts_on():
    """Image 0 has w = 1, in image 1 one token alone has another; the counts are those in closed form."""

    def cfg(state, unknown_after):
        w = torch.tensor([1.0, 1.0, 2.0, 3.0])[state.images].unsqueeze(1).repeat(1, state.mask.shape[1])
        w[state.images == 1, 3] = 2.0
        return w

    def group(state):  # all at the second step
        return torch.full_like(state.num_unknown, 2.0)

    rules = replace(build_rules("baseline", order="raster", cfg=2.0), cfg=cfg, group=group)
    said, seen = counted(tiny_mar(), rules=rules, num_iter=2, num_steps="4:3")
    assert said == seen
    # unknown: 64, 5, 20 and 64 tokens; token 3 of image 1 comes at the second step
    assert seen["mar"] == (4 + 2) + (4 + 3)
    assert seen["mlp"] == 4 * (8 + 4) + 3 * (62 + 3 + 18 + 62 + 1 + 18 + 62)


def test_annealed_steps_are_counted():
    said, seen = counted(tiny_mar(), rules=build_rules("baseline", cfg=2.0), num_iter=4, num_steps="5:2")
    assert said == seen


def test_settings_tell_annealed_steps_and_spacings_apart():
    sampling = SampleConfig(num_sampling_steps="50:5", solver="dpmpp")
    assert sampling.name() == "baseline_iter64_steps50-5_cfg1_solver-dpmpp"
    assert replace(sampling, spacing=SOLVERS["dpmpp"].spacing).resolved() == sampling.resolved()
    assert replace(sampling, spacing="uniform").name() == f"{sampling.name()}_spacing-uniform"
    assert SampleConfig(num_sampling_steps="25").num_sampling_steps == 25  # as older lines of results.jsonl have it
    assert SampleConfig().name() == "baseline_iter64_steps100_cfg1"
    with pytest.raises(ValueError, match="'50:x'"):
        SampleConfig(num_sampling_steps="50:x")


@pytest.mark.parametrize("mode", ["policy", "guidance", "both"])
def test_evaluations_with_learned_rules_are_those_made_too(mode):
    said, seen = counted(tiny_mar(), rules=build_rules(mode, tiny_heads(), cfg=2.0), num_iter=6, num_steps=2)
    assert said == seen and seen["mlp"] >= 2 * 89


def per_image(tmp_path, num_iter, num_steps, **options) -> tuple[float, float]:
    """(mar_evals, mlp_evals) that sampling reports."""
    sampling = SampleConfig(num_iter=num_iter, num_sampling_steps=num_steps, **options)
    arguments = (tiny_mar(), build_tokenizer("pixel", channels=1), sampling, [0, 1, 2, 0, 1], 3, tmp_path)
    where = dict(batch_size=2, device=torch.device("cpu"), dtype=torch.float32)
    found = sample_images(*arguments, **where)
    again = sample_images(*arguments, **where)
    assert again["num_made"] == 0 and again["mar_evals"] is again["mlp_evals"] is None
    return found["mar_evals"], found["mlp_evals"]


@pytest.mark.parametrize("num_iter, num_steps", [(1, 2), (6, 2), (9, 1)])
def test_evaluations_an_image_in_closed_form(num_iter, num_steps, tmp_path):
    """L = 64: cfg 1 is one pass a step, guidance two; an interval guides the steps in it, with their tokens."""
    length, unknown, guided = 64, [64], []
    for step in range(num_iter):
        after = math.floor(length * math.cos(math.pi / 2 * (step + 1) / num_iter)) if step < num_iter - 1 else 0
        unknown.append(min(unknown[-1] - 1, max(after, 1)) if step < num_iter - 1 else 0)
        guided.append(0.25 <= (length - max(unknown[-1], 1)) / length <= 0.75)
    groups = -np.diff(unknown)
    runs = {
        "off": ({}, (num_iter, length * num_steps)),
        "constant": (dict(cfg=2.0, cfg_schedule="constant"), (2 * num_iter, 2 * length * num_steps)),
        "linear": (dict(cfg=2.0), (2 * num_iter, 2 * length * num_steps)),  # v > 0 from the first step on
        "interval": (
            dict(cfg=2.0, cfg_schedule="interval", cfg_interval="0.25,0.75"),
            (num_iter + sum(guided), (length + groups[guided].sum()) * num_steps),
        ),
    }
    for name, (options, expected) in runs.items():
        assert per_image(tmp_path / name, num_iter, num_steps, **options) == expected, name


# ----------------------------------------------------------------------------------------------------------- the table


def line(mode, num_iter, seed, fid, **more) -> dict:
    """One line of results as sample.py writes it, as far as the table reads it."""
    settings = dict(infer_mode=mode, order=None, num_iter=num_iter, cfg=1.5, num_images=600, class_labels=[0, 1])
    row = dict(settings=dict(settings, seed=seed), weights="aa", reference="bb", num_made=600, images_per_second=80.0)
    row |= dict(mar_evals=2.0 * num_iter, mlp_evals=3200.0, metrics=dict(fid=fid, is_mean=7.5))
    for key, value in more.items():
        row["settings" if key in settings else key] = row["settings"] | {key: value} if key in settings else value
    return row


@pytest.fixture
def results(tmp_path):
    """Two modes, three numbers of steps out of order, three seeds."""
    draws = np.random.default_rng(0)
    lines = [line(m, k, s, draws.uniform(0.2, 2)) for m in ("policy", "both") for k in (16, 4, 8) for s in (0, 1, 2)]
    return write(tmp_path / "results.jsonl", lines), lines


def write(path, lines):
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    return path


def table(capsys, *argv) -> list[dict[str, str]]:
    """The rows of the Markdown table that the program prints."""
    capsys.readouterr()
    assert make_table.main([*map(str, argv)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len({len(text) for text in printed}) == 1  # aligned
    head, rule, *body = [[part.strip() for part in text.strip("|").split("|")] for text in printed]
    assert all(set(part) <= set("-:") for part in rule)
    return [dict(zip(head, cells)) for cells in body]


def test_long_settings_are_shortened_but_stay_different(capsys, tmp_path):
    """Of two autoencoders it may be the middle of the name that differs."""
    place = "diffusers:output_dir/{}/autoencoder"
    for names, shown in (
        ([place.format("kl"), place.format("vq")],) * 2,
        ([place.format("kl"), "pixel"], ["diffusers:…utoencoder", "pixel"]),
    ):
        path = write(tmp_path / "r.jsonl", [line(name, 4, 0, 1.0) for name in names])
        assert [row["infer_mode"] for row in table(capsys, path)] == shown


def test_the_table_is_mean_and_deviation_over_seeds(results, capsys, tmp_path):
    path, lines = results
    found = table(capsys, path, "--csv", tmp_path / "t.csv")
    assert list(found[0])[:4] == ["infer_mode", "num_iter", "seeds", "FID"]  # what does not vary is not shown
    points = [(row["infer_mode"], int(row["num_iter"])) for row in found]
    assert points == [(m, k) for m in ("policy", "both") for k in (4, 8, 16)]
    with open(tmp_path / "t.csv", newline="") as file:
        exact = list(csv.DictReader(file))
    for (mode, k), row, full in zip(points, found, exact):
        of_point = [r for r in lines if (r["settings"]["infer_mode"], r["settings"]["num_iter"]) == (mode, k)]
        fids = [r["metrics"]["fid"] for r in of_point]
        mean, spread = np.mean(fids), np.std(fids, ddof=1)
        assert [float(x) for x in row["FID"].split(" ± ")] == pytest.approx([mean, spread], abs=6e-4)
        assert (float(full["fid"]), float(full["fid_std"])) == pytest.approx((mean, spread), rel=1e-12)
        assert (full["infer_mode"], full["num_iter"], full["seeds"]) == (mode, str(k), "3")
        assert float(full["mar_evals"]) == 2 * k and float(row["transformer evals"]) == 2 * k
        assert row["MLP evals"] == "3200" and row["images/s"] == "80" and row["seeds"] == "3"


@pytest.mark.parametrize("change", [dict(weights="cc"), dict(num_images=900), dict(cfg=3.0)])
def test_what_must_not_be_averaged_becomes_a_column(change, tmp_path, capsys):
    lines = [line("both", 8, 0, 1.0), line("both", 8, 1, 2.0), line("both", 8, 0, 5.0, **change)]
    found = table(capsys, write(tmp_path / "r.jsonl", lines), "--metrics", "fid")
    ((name, value),) = change.items()
    assert [row["FID"] for row in found] == ["1.500 ± 0.707", "5.000"]
    assert found[1][name] == (f"{value:g}" if isinstance(value, float) else str(value))
    assert [row["seeds"] for row in found] == ["2", "1"]


def test_gaps_and_repetitions_in_the_results(tmp_path, capsys):
    """Nothing made: no costs. A metric missing in one row. The same seed twice: the later line. A torn last line."""
    resumed = line("both", 8, 0, 1.0, num_made=0, mar_evals=None, mlp_evals=None, images_per_second=0.0)
    other = line("baseline", 8, 0, 7.0, metrics={"fid": 3.0})
    path = write(tmp_path / "r.jsonl", [line("both", 8, 0, 9.0), resumed, other])
    path.write_text(path.read_text() + json.dumps(other)[:50])
    both, baseline = table(capsys, path)
    assert (both["FID"], both["transformer evals"], both["images/s"], both["IS"]) == ("1", "–", "–", "7.500")
    assert (baseline["FID"], baseline["transformer evals"], baseline["IS"]) == ("3", "16", "–")
    assert "seeds" not in both


def test_the_plot_is_a_picture_of_both_costs(results, tmp_path, capsys):
    make_table.main([str(results[0]), "--plot", str(tmp_path / "p.png")])
    with Image.open(tmp_path / "p.png") as image:
        assert image.format == "PNG" and image.width > 1000
        pixels = np.asarray(image.convert("RGB"))
    halves = np.array_split(pixels, 2, axis=1)
    for color in ((0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)):  # one for each of the two modes, in both panels
        assert all((half == color).all(-1).sum() > 100 for half in halves)


# --------------------------------------------------------------------------------------------------------- several runs


def run_file(folder, *lines):
    folder.mkdir(parents=True)
    return write(folder / "results.jsonl", lines)


def test_several_files_are_runs_whose_trainings_are_averaged(tmp_path, capsys):
    """Seeds of training are other weights in other checkpoints; what one checkpoint gave before it was trained on,
    with the same seed, is replaced."""
    narrow = [line("both", 8, s, 1.0 + s, weights=f"w{s}", checkpoint=f"narrow/{s}") for s in (0, 1, 2)]
    stale = line("both", 8, 2, 99.0, weights="old", checkpoint="narrow/2")
    wide = [line("both", 8, 0, f, weights=w, checkpoint=w) for f, w in ((4.0, "a"), (6.0, "b"))]  # one sampling seed
    paths = [run_file(tmp_path / "width_9", stale, *narrow), run_file(tmp_path / "width_10", *wide)]
    found = table(capsys, *paths, "--csv", tmp_path / "t.csv")
    assert [row["run"] for row in found] == ["width_9", "width_10"]  # as they were given
    assert [(row["seeds"], row["FID"]) for row in found] == [("3", "2.000 ± 1.000"), ("2", "5.000 ± 1.414")]
    assert list(found[0])[:2] == ["run", "seeds"]  # weights are no column
    with open(tmp_path / "t.csv", newline="") as file:
        assert [row["run"] for row in csv.DictReader(file)] == ["width_9", "width_10"]
    # in one file other weights are another setting, as before
    assert [row["weights"] for row in table(capsys, paths[1])] == ["a", "b"]


def test_settings_that_differ_within_a_run_are_rows_of_it(tmp_path, capsys):
    paths = [run_file(tmp_path / r, *(line("both", k, 0, k * f) for k in (8, 4))) for r, f in (("b", 1), ("a", 2))]
    found = table(capsys, *paths, "--metrics", "fid")
    assert [(row["run"], row["num_iter"], float(row["FID"])) for row in found] == [
        ("b", "4", 4), ("b", "8", 8), ("a", "4", 8), ("a", "8", 16)
    ]  # fmt: skip


def plotted(monkeypatch, capsys, *argv) -> list[tuple]:
    """(panel, label, colour, x, y) of every line that the plot has; its picture is written as well."""
    from matplotlib import pyplot as plt

    monkeypatch.setattr(plt, "close", lambda figure: None)
    assert make_table.main([*map(str, argv)]) == 0
    capsys.readouterr()
    figure = plt.gcf()
    monkeypatch.undo()
    found = []
    for axis in figure.axes:
        for bars in axis.containers:
            curve = bars[0]
            x, y = curve.get_xdata(orig=True), curve.get_ydata()
            where = f"{axis.get_xlabel()}: {axis.get_ylabel()} {axis.get_xscale()}"
            found.append((where, bars.get_label(), curve.get_color(), list(x), list(y)))
    plt.close(figure)
    return found


def test_a_plot_of_runs_has_a_colour_for_each(tmp_path, monkeypatch, capsys):
    paths = [
        run_file(tmp_path / r, *(line(m, k, 0, k + len(r)) for m in ("both", "policy") for k in (8, 4, 16)))
        for r in ("b", "aa")
    ]
    lines = plotted(monkeypatch, capsys, *paths, "--plot", tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    first = [found for found in lines if found[0].startswith("transformer")]
    assert [(label, colour) for _, label, colour, *_ in first] == [
        (f"{r}, infer_mode {m}", c) for r, c in (("b", "C0"), ("aa", "C1")) for m in ("both", "policy")
    ]
    assert first[0][3:] == ([8, 16, 32], [5, 9, 17]) and len(lines) == 8


@pytest.mark.parametrize("x, far", [("cfg", False), ("num_sampling_steps", True), ("images_per_second", True)])
def test_a_plot_against_a_setting_or_the_speed(x, far, tmp_path, monkeypatch, capsys):
    """Every metric has a panel; points that differ in x only are joined, in its order."""
    values, speeds = (50, 5, 250) if far else (1.5, 1.0, 3.0), (10.0, 40.0, 20.0)
    setting = "num_iter" if x == "images_per_second" else x
    lines = []
    for mode, shift in (("both", 0), ("policy", 100)):
        for i, (value, speed) in enumerate(zip(values, speeds)):
            row = line(mode, 8, 0, shift + i, images_per_second=speed)
            row["settings"][setting] = value
            lines.append(row)
    path = write(tmp_path / "r.jsonl", lines)
    found = plotted(monkeypatch, capsys, path, "--plot", tmp_path / "p.png", "--x", x, "--metrics", "is_mean,fid")
    along = dict(zip(speeds if x == "images_per_second" else values, range(3)))
    assert len(found) == 4 and {len(where.split(": ")) for where, *_ in found} == {2}
    assert [where.split(": ")[1].split()[0] for where, *_ in found] == ["IS", "IS", "FID", "FID"]
    assert all(where.endswith("log" if far else "linear") for where, *_ in found)
    for (_, label, colour, at, fid), shift in zip(found[2:], (0, 100)):
        assert (label, colour) == (("both", "C0") if not shift else ("policy", "C1"))
        assert at == sorted(along) and fid == [shift + along[value] for value in at]


def test_a_plot_against_the_runs_themselves(tmp_path, monkeypatch, capsys):
    paths = [run_file(tmp_path / r, line("both", 8, 0, f)) for r, f in (("w9", 3.0), ("w10", 2.0))]
    ((where, _, _, x, y),) = plotted(
        monkeypatch, capsys, *paths, "--plot", tmp_path / "p.png", "--x", "run", "--metrics", "fid"
    )
    assert where.startswith("run: FID") and (x, y) == (["w9", "w10"], [3.0, 2.0])


def test_runs_that_cannot_be_told_apart_are_one_line(tmp_path, capsys):
    paths = [run_file(tmp_path / part / "samples", line("both", 8, 0, 1.0)) for part in ("a", "b")]
    assert "'samples'" in refused(make_table.main, list(map(str, paths)), capsys)


@pytest.mark.parametrize(
    "content, flags, shown",
    [
        (None, "", "results.jsonl"),
        ("", "", "no results"),
        ("[]\nnonsense\n", "", "no results"),
        (line("both", 4, 0, 1.0), "--metrics fid,nope", "'nope'"),
        (line("both", 4, 0, 1.0), "--csv {}/missing/t.csv", "missing"),
        (line("both", 4, 0, 1.0, num_made=0), "--plot {}/p.png", "nothing to plot"),
        (line("both", 4, 0, 1.0), "--nope", "--nope"),
        (line("both", 4, 0, 1.0), "--plot {}/p.png --x cfg", "'cfg'"),  # the same everywhere
        (line("both", 4, 0, 1.0), "--plot {}/p.png --x nope", "'nope'"),
        (line("both", 4, 0, 1.0), "--x cfg", "--plot"),
    ],
)
def test_a_table_that_cannot_be_made_is_one_line(content, flags, shown, tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    assert shown in refused(make_table.main, [str(path), *flags.format(tmp_path).split()], capsys)
    assert {p.name for p in tmp_path.iterdir()} <= {"results.jsonl"}
