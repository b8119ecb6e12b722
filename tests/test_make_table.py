"""The tables and plots that make_table.py makes of results: of one run, of several, and of several kinds."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from scripts import make_table
from tests.test_cli import refused

# ----------------------------------------------------------------------------------------------------------- the table


def line(mode, num_iter, seed, fid, **changes) -> dict:
    """One line of results as sample.py writes it, as far as the table reads it."""
    settings = dict(infer_mode=mode, order=None, num_iter=num_iter, cfg=1.5, num_images=600, class_labels=[0, 1])
    row = dict(settings=dict(settings, seed=seed), weights="aa", reference="bb", num_made=600, images_per_second=80.0)
    row |= dict(mar_evals=2.0 * num_iter, mlp_evals=3200.0, metrics=dict(fid=fid, is_mean=7.5))
    for key, value in changes.items():
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
    table_rows = table(capsys, path, "--csv", tmp_path / "t.csv")
    assert list(table_rows[0])[:4] == ["infer_mode", "num_iter", "seeds", "FID"]  # what does not vary is not shown
    points = [(row["infer_mode"], int(row["num_iter"])) for row in table_rows]
    assert points == [(m, k) for m in ("policy", "both") for k in (4, 8, 16)]
    with open(tmp_path / "t.csv", newline="") as file:
        exact = list(csv.DictReader(file))
    for (mode, k), row, full in zip(points, table_rows, exact):
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
    table_rows = table(capsys, write(tmp_path / "r.jsonl", lines), "--metrics", "fid")
    ((name, value),) = change.items()
    assert [row["FID"] for row in table_rows] == ["1.500 ± 0.707", "5.000"]
    assert table_rows[1][name] == (f"{value:g}" if isinstance(value, float) else str(value))
    assert [row["seeds"] for row in table_rows] == ["2", "1"]


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


def test_a_line_from_before_a_flag_is_of_the_setting_that_it_had(tmp_path, capsys):
    old, new = line("both", 8, 1, 2.0), line("both", 8, 2, 4.0)
    new["settings"] |= dict(group_base="cosine", schedule=None)
    other = line("both", 8, 2, 9.0)
    other["settings"] |= dict(group_base="staged", schedule=None)
    rows = table(capsys, write(tmp_path / "results.jsonl", [old, new, other]))
    assert [(row["group_base"], row["seeds"]) for row in rows] == [("cosine", "2"), ("staged", "1")]
    assert rows[0]["FID"].startswith("3.0")


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
    table_rows = table(capsys, *paths, "--csv", tmp_path / "t.csv")
    assert [row["run"] for row in table_rows] == ["width_9", "width_10"]  # as they were given
    assert [(row["seeds"], row["FID"]) for row in table_rows] == [("3", "2.000 ± 1.000"), ("2", "5.000 ± 1.414")]
    assert list(table_rows[0])[:2] == ["run", "seeds"]  # weights are no column
    with open(tmp_path / "t.csv", newline="") as file:
        assert [row["run"] for row in csv.DictReader(file)] == ["width_9", "width_10"]
    # in one file other weights are another setting, as before
    assert [row["weights"] for row in table(capsys, paths[1])] == ["a", "b"]


def test_settings_that_differ_within_a_run_are_rows_of_it(tmp_path, capsys):
    paths = [run_file(tmp_path / r, *(line("both", k, 0, k * f) for k in (8, 4))) for r, f in (("b", 1), ("a", 2))]
    table_rows = table(capsys, *paths, "--metrics", "fid")
    assert [(row["run"], row["num_iter"], float(row["FID"])) for row in table_rows] == [
        ("b", "4", 4), ("b", "8", 8), ("a", "4", 8), ("a", "8", 16)
    ]  # fmt: skip


def figure_of(monkeypatch, *argv):
    """The figure of the plot that the program makes; its picture is written as well."""
    from matplotlib import pyplot as plt

    monkeypatch.setattr(plt, "close", lambda figure: None)
    assert make_table.main([*map(str, argv)]) == 0
    figure = plt.gcf()
    monkeypatch.undo()
    plt.close(figure)
    return figure


def plotted(monkeypatch, capsys, *argv) -> list[tuple]:
    """(panel, label, colour, x, y) of every line that the plot has."""
    figure, curves = figure_of(monkeypatch, *argv), []
    capsys.readouterr()
    for axis in figure.axes:
        for bars in axis.containers:
            curve = bars[0]
            x, y = curve.get_xdata(orig=True), curve.get_ydata()
            where = f"{axis.get_xlabel()}: {axis.get_ylabel()} {axis.get_xscale()}"
            curves.append((where, bars.get_label(), curve.get_color(), list(x), list(y)))
    return curves


def test_a_panel_shows_all_that_have_its_own_figure_and_the_others_are_named(tmp_path, monkeypatch, capsys):
    """One mode has FID only, one IS only, one neither: the legend has both, in the colours of all panels."""
    figures = dict(baseline=dict(fid=3.0), both=dict(is_mean=8.0), policy=dict(psnr=20.0))
    lines = [line(mode, k, 0, 0.0, metrics=metrics) for mode, metrics in figures.items() for k in (4, 8)]
    words = write(tmp_path / "r.jsonl", lines), "--plot", tmp_path / "p.png", "--x", "num_iter"
    figure = figure_of(monkeypatch, *words, "--metrics", "fid,is_mean")
    said = capsys.readouterr().err
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["baseline", "both"]
    assert "not in the plot" in said and "infer_mode policy, num_iter 4; infer_mode policy, num_iter 8" in said
    assert "baseline" not in said and said.count("\n") == 1
    first, second = plotted(monkeypatch, capsys, *words, "--metrics", "fid,is_mean")
    assert (first[1], first[2], first[4]) == ("baseline", "C0", [3, 3])
    assert (second[1], second[2], second[4]) == ("both", "C1", [8, 8])


def test_a_panel_without_anything_is_left_out_and_named(tmp_path, monkeypatch, capsys):
    lines = [line("both", k, 0, 1.0, mlp_evals=None) for k in (4, 8)]
    figure = figure_of(monkeypatch, write(tmp_path / "r.jsonl", lines), "--plot", tmp_path / "p.png")
    assert len(figure.axes) == 1 and "no panel, since no line has both: mlp_evals with fid\n" in capsys.readouterr().err


def test_a_plot_of_runs_has_a_colour_for_each(tmp_path, monkeypatch, capsys):
    paths = [
        run_file(tmp_path / r, *(line(m, k, 0, k + len(r)) for m in ("both", "policy") for k in (8, 4, 16)))
        for r in ("b", "aa")
    ]
    lines = plotted(monkeypatch, capsys, *paths, "--plot", tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    first = [curve for curve in lines if curve[0].startswith("transformer")]
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
    curves = plotted(monkeypatch, capsys, path, "--plot", tmp_path / "p.png", "--x", x, "--metrics", "is_mean,fid")
    along = dict(zip(speeds if x == "images_per_second" else values, range(3)))
    assert len(curves) == 4 and {len(where.split(": ")) for where, *_ in curves} == {2}
    assert [where.split(": ")[1].split()[0] for where, *_ in curves] == ["IS", "IS", "FID", "FID"]
    assert all(where.endswith("log" if far else "linear") for where, *_ in curves)
    for (_, label, colour, at, fid), shift in zip(curves[2:], (0, 100)):
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


# -------------------------------------------------------------------------------------------------------- several kinds


def tables(path, capsys, *flags) -> dict[str, list[list[str]]]:
    """{heading, "" for none: the cells of the table under it}."""
    capsys.readouterr()
    assert make_table.main([str(path), *flags]) == 0
    parts, heading = {}, ""
    for text in capsys.readouterr().out.splitlines():
        if text.endswith(":"):
            heading = text[:-1]
        elif text.startswith("|"):
            parts.setdefault(heading, []).append([part.strip() for part in text.strip("|").split("|")])
    return parts


def test_kinds_references_and_features_are_not_mixed(tmp_path, capsys):
    lines = [line("both", 8, s, fid) for s, fid in enumerate((1.5, 2.0))]  # from before there were kinds
    lines += [line("both", 8, 2, 2.5, kind="generation"), line("both", 8, 0, 50.0, reference="cc")]
    reconstruction = line("both", 8, 0, 0.0, kind="reconstruction", metrics=dict(rfid=0.5, psnr=25.0, ssim=0.9))
    by_clip = line("both", 8, 0, 70.0)
    by_clip["settings"]["features"] = "clip"
    path = write(tmp_path / "r.jsonl", [*lines, reconstruction, by_clip])
    parts = tables(path, capsys)
    assert list(parts) == [
        "generation, features inception, reference bb",
        "generation, features inception, reference cc",
        "reconstruction, features inception, reference bb",
        "generation, features clip, reference bb",
    ]
    first, other, rec, clip = ({h: c for h, c in zip(t[0], t[2])} for t in parts.values())
    assert (first["FID"], first["seeds"]) == ("2.000 ± 0.500", "3")
    assert (other["FID"], clip["FID"]) == ("50", "70") and all(len(t) == 3 for t in parts.values())
    assert (rec["rFID"], rec["PSNR (dB)"], rec["SSIM"]) == ("0.5000", "25", "0.9000")
    assert "FID" not in rec and "rFID" not in first

    line_of_error = refused(make_table.main, [str(path), "--plot", str(tmp_path / "p.png")], capsys)
    assert "cannot be in one plot" in line_of_error and not (tmp_path / "p.png").exists()
    write(path, [*lines[:3], reconstruction])
    assert make_table.main([str(path), "--plot", str(tmp_path / "p.png"), "--csv", str(tmp_path / "t.csv")]) == 0
    assert (tmp_path / "p.png").is_file()
    head, *body = (tmp_path / "t.csv").read_text().splitlines()
    assert head.startswith("kind,") and [text.split(",")[0] for text in body] == ["generation", "reconstruction"]


# ------------------------------------------------------------------------------------------------------------ bad input


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
        (line("both", 4, 0, 1.0, num_made=0), "--plot {}/p.png --x nope", "differ in no setting, and no line has"),
        (line("both", 4, 0, 1.0, num_made=0, metrics={}), "", "no line of these results has figures or evaluations"),
    ],
)
def test_a_table_that_cannot_be_made_is_one_line(content, flags, shown, tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    assert shown in refused(make_table.main, [str(path), *flags.format(tmp_path).split()], capsys)
    assert {p.name for p in tmp_path.iterdir()} <= {"results.jsonl"}


def test_a_folder_is_called_one_and_the_file_in_it_is_named(tmp_path, capsys):
    words = [str(tmp_path)]
    assert f"{tmp_path} is a folder; no results.jsonl in it" in refused(make_table.main, words, capsys)
    path = write(tmp_path / "results.jsonl", [line("both", 4, 0, 1.0)])
    assert f"{tmp_path} is a folder; take {path}" in refused(make_table.main, words, capsys)


def test_a_part_without_figures_is_no_empty_table(tmp_path, capsys):
    lines = [line("both", 4, 0, 1.0), line("both", 4, 0, 1.0, reference="cc", num_made=0, metrics={})]
    assert make_table.main([str(write(tmp_path / "r.jsonl", lines))]) == 0
    printed = capsys.readouterr().out
    assert "reference cc:\n\nneither figures nor evaluations\n" in printed and "|  |" not in printed


@pytest.mark.parametrize(
    "change, shown",
    [
        (dict(metrics=dict(fid=float("nan"))), "fid must be a finite number, got nan"),
        (dict(metrics=dict(fid=1.0, is_mean=float("inf"))), "is_mean must be a finite number, got inf"),
        (dict(metrics=dict(fid="12")), "fid must be a finite number, got '12'"),
        (dict(metrics=[1.0]), "metrics must be figures by name, got [1.0]"),
        (dict(images_per_second=float("-inf")), "images_per_second must be a finite number, got -inf"),
    ],
)
@pytest.mark.parametrize("flags", ["", "--csv {}/t.csv", "--plot {}/p.png"])
def test_a_figure_that_is_no_number_is_named_with_file_and_line(change, shown, flags, tmp_path, capsys):
    path = write(tmp_path / "results.jsonl", [line("both", 4, 0, 1.0), line("both", 8, 0, 1.0, **change)])
    said = refused(make_table.main, [str(path), *flags.format(tmp_path).split()], capsys)
    assert f"{path}, line 2: {shown}" in said and [p.name for p in tmp_path.iterdir()] == ["results.jsonl"]
    path.write_text(path.read_text().replace("NaN", "null"))
    if "nan" in shown:  # as sample.py writes it
        assert [row["FID"] for row in table(capsys, path)] == ["1", "–"]


@pytest.mark.parametrize("encoding, shown", [("utf-16", "line 1 has 0xff"), ("latin-1", "line 2 has 0xe9")])
def test_a_file_in_another_encoding_is_named_with_the_line(encoding, shown, tmp_path, capsys):
    path, rows = tmp_path / "results.jsonl", [line("both", 4, 0, 1.0), line("é", 8, 0, 1.0)]
    path.write_bytes("\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode(encoding))
    said = refused(make_table.main, [str(path)], capsys)
    assert f"{path} is no UTF-8 text: {shown}" in said


def test_byte_order_marks_and_line_ends_of_editors_lose_no_row(results, tmp_path, capsys):
    """At the start of the file, and in its middle where two such files were put together."""
    path, lines = results
    expected = table(capsys, path)
    for newline in ("\n", "\r\n"):
        texts = [newline.join(json.dumps(row) for row in part) + newline for part in (lines[:1], lines[1:])]
        path.write_bytes(b"".join(text.encode("utf-8-sig") for text in texts))
        assert table(capsys, path) == expected
