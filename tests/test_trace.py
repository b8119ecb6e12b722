"""Traces: what sample.py --save_trace records of growing images, that it changes none, and the pictures made of it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from heads.policy import PolicyHeads
from models.tokenizers import build_tokenizer
from sampling.adaptive import Spread
from sampling.run import sample_images
from sampling.settings import SampleConfig
from sampling.trace import NEW, num_traced
from scripts import plot_trace
from tests.helpers import each_rank, named_weights, on_cpu, tiny_mar
from tests.test_cli import refused
from tests.test_sample import draw, folder_of, pngs, rows, train_tiny
from util.images.pictures import read_png

GREY = 128
N, K = 5, 4  # images traced, out of 11 in batches of 3; steps
FLAGS = f"--num_images 11 --eval_bsz 3 --num_iter {K} --num_sampling_steps 2 --cfg 2".split()
FLAGS += "--tau_schedule linear --temperature 0.5 --temperature_end 1.3".split()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return train_tiny(tmp_path_factory.mktemp("checkpoint"), "--batch_size", 600)


@pytest.fixture(scope="module")
def traced(checkpoint, tmp_path_factory):
    """OUT with one traced setting."""
    out = tmp_path_factory.mktemp("traced")
    assert draw(checkpoint, out, *FLAGS, "--save_trace", N) == 0
    return out


def load(folder) -> dict[str, np.ndarray]:
    with np.load(folder / "trace.npz") as file:
        return dict(file)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert np.array_equal(a[key], b[key]), key


# ------------------------------------------------------------------------------------------------- what is recorded


def test_shapes(traced):
    trace = load(folder_of(traced))
    shapes = dict(order_step=(N, 64), tau=(N, 64), cfg=(N, 64), group_size=(N, K), frames=(N, K, 8, 8, 1), labels=(N,))
    assert {key: value.shape for key, value in trace.items()} == shapes
    assert trace["frames"].dtype == np.uint8 and trace["labels"].tolist() == list(range(N))


def test_steps_tokens_and_schedules_belong_together(traced):
    trace = load(folder_of(traced))
    for i in range(N):
        order, groups = trace["order_step"][i], trace["group_size"][i]
        assert np.array_equal(np.bincount(order, minlength=K), groups) and groups.sum() == 64 and (groups > 0).all()
        assert trace["tau"][i] == pytest.approx(0.5 + (1.3 - 0.5) * (order + 1) / K, rel=1e-6)
        unknown = np.maximum(64 - groups.cumsum(), 1)[order]
        assert trace["cfg"][i] == pytest.approx(1 + (64 - unknown) / 64, rel=1e-6)
    assert len({order.tobytes() for order in trace["order_step"]}) == N


def test_a_frame_is_the_picture_as_far_as_it_is_known(traced):
    trace, folder = load(folder_of(traced)), folder_of(traced)
    for i in range(N):
        picture = read_png(folder / f"{i}.png")
        for step in range(K):
            known = (trace["order_step"][i] <= step).reshape(8, 8, 1)
            assert np.array_equal(trace["frames"][i, step], np.where(known, picture, GREY))
        assert np.array_equal(trace["frames"][i, -1], picture)


def test_patches_of_several_pixels_and_steps_after_the_last_token(tmp_path):
    """4 x 4 patches of 2 x 2 pixels in colour, and more steps than there are tokens."""
    sampling = SampleConfig(num_iter=20, num_sampling_steps=1)
    mar = tiny_mar(img_size=8, patch_size=2, vae_embed_dim=3)
    parts = on_cpu(mar, build_tokenizer("pixel", channels=3))
    sample_images(parts, sampling, [0, 1, 2], 5, tmp_path, batch_size=4, num_traced=2)
    trace = load(tmp_path)
    assert trace["frames"].shape == (2, 20, 8, 8, 3) and trace["group_size"].tolist() == 2 * [16 * [1] + 4 * [0]]
    for i in range(2):
        picture = read_png(tmp_path / f"{i}.png")
        known = np.kron(trace["order_step"][i].reshape(4, 4) <= 7, np.ones((2, 2))).astype(bool)[..., None]
        assert np.array_equal(trace["frames"][i, 7], np.where(known, picture, GREY))
        assert all(np.array_equal(frame, picture) for frame in trace["frames"][i, 15:])


def test_learned_rules_are_traced_image_by_image(tmp_path):
    """Groups, τ and w differ between the images of a batch, some of which finish early."""
    heads = PolicyHeads(16, tau_mode="token", cfg_mode="token", rho=(0.1, 0.9), tau=(0.5, 1.5))
    heads = named_weights(heads, scale=0.15).eval()
    sampling = SampleConfig(infer_mode="both", cfg=2.0, num_iter=12, num_sampling_steps=1)
    parts = on_cpu(tiny_mar(), build_tokenizer("pixel", channels=1), heads)
    sample_images(parts, sampling, [0, 1, 2, 0, 1, 2], 5, tmp_path, batch_size=4, num_traced=5)
    trace = load(tmp_path)
    assert len({groups.tobytes() for groups in trace["group_size"]}) == N
    for i in range(N):
        order, picture = trace["order_step"][i], read_png(tmp_path / f"{i}.png")
        assert np.array_equal(np.bincount(order, minlength=12), trace["group_size"][i])
        assert len(np.unique(trace["tau"][i])) > 20 and len(np.unique(trace["cfg"][i])) > 20
        assert trace["tau"][i].min() >= 0.5 and trace["tau"][i].max() <= 1.5
        for step in range(12):
            known = (order <= step).reshape(8, 8, 1)
            assert np.array_equal(trace["frames"][i, step], np.where(known, picture, GREY))


# ------------------------------------------------------------------------------- what it changes, when it is made


def test_tracing_changes_no_image_and_no_setting(traced, checkpoint, tmp_path):
    assert draw(checkpoint, tmp_path, *FLAGS) == 0
    assert pngs(folder_of(tmp_path)) == pngs(folder_of(traced))
    (without,), (with_trace,) = rows(tmp_path), rows(traced)
    assert without["settings"] == with_trace["settings"] and without["mar_evals"] == with_trace["mar_evals"] == 2 * K
    assert not (folder_of(tmp_path) / "trace.npz").exists()


@pytest.mark.parametrize("finished", [True, False])
def test_a_missing_trace_is_made_from_its_batches_only(traced, checkpoint, tmp_path, finished):
    """Images 0…5 are the batches of the five traced ones; what comes after them is not touched."""
    assert draw(checkpoint, tmp_path, *FLAGS) == 0
    folder = folder_of(tmp_path)
    before, line = pngs(folder), rows(tmp_path)[0]
    times = {i: (folder / f"{i}.png").stat().st_mtime_ns for i in range(11)}
    if not finished:
        (tmp_path / "results.jsonl").unlink()
    assert draw(checkpoint, tmp_path, *FLAGS, "--save_trace", N) == 0
    assert_same(load(folder), load(folder_of(traced)))
    assert pngs(folder) == before
    assert [i for i in range(11) if (folder / f"{i}.png").stat().st_mtime_ns != times[i]] == [0, 1, 2, 3, 4, 5]
    (row,) = rows(tmp_path)
    assert row == line if finished else row["num_made"] == 6
    # now it is there: nothing is made again, nor for a smaller one; a broken or a larger one is
    stamp = (folder / "trace.npz").stat().st_mtime_ns
    for number in (N, 2, 0):
        assert draw(checkpoint, tmp_path, *FLAGS, "--save_trace", number) == 0
        assert (folder / "trace.npz").stat().st_mtime_ns == stamp
    (folder / "trace.npz").write_bytes((folder / "trace.npz").read_bytes()[:300])
    assert num_traced(folder / "trace.npz") == 0
    assert draw(checkpoint, tmp_path, *FLAGS, "--save_trace", 99) == 0
    assert num_traced(folder / "trace.npz") == 11 and pngs(folder) == before


def test_a_trace_of_other_weights_is_removed(tmp_path):
    tokenizer, sampling = build_tokenizer("pixel", channels=1), SampleConfig(num_iter=2, num_sampling_steps=1)
    sample_images(on_cpu(tiny_mar(), tokenizer), sampling, [0], 5, tmp_path, batch_size=4, num_traced=1)
    other = tiny_mar()
    with torch.no_grad():
        other.mask_token.add_(1)
    sample_images(on_cpu(other, tokenizer), sampling, [0], 5, tmp_path, batch_size=4)
    assert not (tmp_path / "trace.npz").exists()


def test_a_trace_made_afterwards_on_another_device_leaves_the_folder_whole(checkpoint, tmp_path):
    """run.json then says something else, so that all images are made again, and what is made of them."""
    assert draw(checkpoint, tmp_path, *FLAGS) == 0
    folder = folder_of(tmp_path)
    (folder / "run.json").write_text("another device")
    before = {p.name: p.read_bytes() for p in folder.glob("*.*g")}
    assert draw(checkpoint, tmp_path, *FLAGS, "--save_trace", 1) == 0
    assert {p.name: p.read_bytes() for p in folder.glob("*.*g")} == before and "grid.png" in before
    assert (folder / "samples.npz").is_file() and num_traced(folder / "trace.npz") == 1 and len(rows(tmp_path)) == 1


def test_two_processes_make_the_trace_of_one(tmp_path, monkeypatch):
    tokenizer, sampling = build_tokenizer("pixel", channels=1), SampleConfig(num_iter=3, num_sampling_steps=1)
    mar, labels = tiny_mar(), [i % 3 for i in range(13)]

    def run(folder):
        parts = on_cpu(mar, tokenizer)
        return sample_images(parts, sampling, labels, 5, folder, batch_size=2, num_traced=5)["num_made"]

    assert run(tmp_path / "one") == 13
    made = []
    for _ in each_rank(monkeypatch):
        made.append(run(tmp_path / "two"))
    assert sum(made) == 13 and made[1] == 3  # the first three batches are the first process's
    assert pngs(tmp_path / "one") == pngs(tmp_path / "two")
    assert_same(load(tmp_path / "one"), load(tmp_path / "two"))


# ----------------------------------------------------------------------------------------------------------- pictures


def test_a_png_and_a_gif_an_image(traced, tmp_path):
    trace = folder_of(traced) / "trace.npz"
    assert plot_trace.main([str(trace), "--out", str(tmp_path / "new" / "dir"), "--images", "3,0"]) == 0
    names = {p.name for p in (tmp_path / "new" / "dir").iterdir()}
    assert names == {"rules.png", "trace_0.png", "trace_0.gif", "trace_3.png", "trace_3.gif"}
    with Image.open(tmp_path / "new" / "dir" / "trace_3.png") as image:
        assert image.format == "PNG" and image.width >= 1000
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 100
    with Image.open(tmp_path / "new" / "dir" / "trace_3.gif") as image:
        assert image.format == "GIF" and image.n_frames == K
        arrays = load(folder_of(traced))
        for step in range(K):
            image.seek(step)
            pixels = np.asarray(image.convert("RGB")).astype(int)
            growing, mask = pixels[::32, :256:32][:8], pixels[16::32, 264 + 16 :: 32]
            assert np.abs(growing - arrays["frames"][3, step]).max() <= 8  # GIF has 256 colours
            new = np.abs(mask - NEW).max(-1) <= 8
            assert np.array_equal(new, (arrays["order_step"][3] == step).reshape(8, 8))


def axes_of(monkeypatch, path, trace) -> list:
    """The axes of the picture of a trace's image 0, which is drawn and written; the last are those of the film."""
    from matplotlib import pyplot as plt

    monkeypatch.setattr(plt, "close", lambda figure: None)
    plot_trace.draw_image(path, trace, 0)
    figure = plt.gcf()
    monkeypatch.undo()
    plt.close(figure)
    return figure.axes


def shown_ticks(direction) -> list[float]:
    low, high = sorted(direction.get_view_interval())
    return [tick for tick in direction.get_ticklocs() if low <= tick <= high]


def test_a_trace_of_scales_has_its_rules_step_by_step_and_no_empty_place(tmp_path, monkeypatch):
    """1 + 4 + 9 tokens, which are no grid, in three steps."""
    order = np.repeat([0, 1, 2], [1, 4, 9])[None]
    frames = np.zeros((1, 3, 8, 8, 1), np.uint8)
    trace = dict(order_step=order, tau=1 + 0.1 * order, cfg=2.0 - order, group_size=np.array([[1, 4, 9]]))
    bars, tau, cfg, *film = axes_of(monkeypatch, tmp_path / "x.png", trace | dict(frames=frames, labels=np.array([7])))
    assert [bar.get_height() for bar in bars.patches] == [1, 4, 9] and bars.axison and len(film) == 8
    for axis, name, values in ((tau, "τ", [1, 1.1, 1.2]), (cfg, "w", [2, 1, 0])):
        (line,) = axis.lines
        assert name in axis.get_title() and axis.axison
        assert line.get_xdata().tolist() == [1, 2, 3] and line.get_ydata() == pytest.approx(values)


@pytest.mark.parametrize("side", [2, 20])
def test_counts_and_steps_have_whole_ticks(side, tmp_path, monkeypatch):
    """Few tokens a step, and a grid too large for numbers in its cells."""
    order = np.minimum(np.arange(side**2), 2)[None]
    counts = np.bincount(order[0], minlength=3)[None]
    ones = np.ones(order.shape)
    trace = dict(order_step=order, tau=ones, cfg=ones, group_size=counts, labels=np.array([0]))
    trace["frames"] = np.zeros((1, 3, side, side, 1), np.uint8)
    axes = axes_of(monkeypatch, tmp_path / "x.png", trace)
    bars = next(axis for axis in axes if "tokens a step" in axis.get_title())
    colours = next(axis for axis in axes if axis.get_label() == "<colorbar>")  # of the steps, the first
    for direction in (bars.xaxis, bars.yaxis, colours.yaxis):
        ticks = shown_ticks(direction)
        assert ticks and all(float(tick).is_integer() for tick in ticks)


def test_the_shares_in_the_picture_are_those_of_the_results_line():
    """Images that end at different steps, values that differ between tokens."""
    rng = np.random.default_rng(0)
    order_step = np.array([rng.permutation([-1, 0, 0, 1, 1, 1, 2, 3]), rng.permutation([0, 0, 0, 0, 0, 1, 1, 1])])
    values = rng.normal(1, 0.2, order_step.shape).astype(np.float32)
    spread = Spread(["tau"])
    for step in range(4):
        images = (order_step >= step).any(axis=1)  # the unfinished ones
        select = torch.tensor(order_step[images] == step)
        tau = torch.tensor(values[images])
        spread.record(step, SimpleNamespace(select=select, tau=tau, cfg=tau))
    spread.end_batch()
    drawn = plot_trace.shares(*plot_trace.by_step(values, order_step))
    reported = spread.report(4, torch.device("cpu"))["tau_variance"]
    assert drawn["total"] > 0 and drawn == pytest.approx(reported, abs=1e-4)


@pytest.mark.parametrize(
    "flags, shown",
    [
        ("{trace} --out {out} --images 0,5", "'0,5'"),
        ("{trace} --out {out} --images -1", "'-1'"),
        ("{trace} --out {out} --images x", "'x'"),
        ("{trace} --out {trace}", "file"),
        ("{trace}", "--out"),
        ("{out}/missing.npz --out {out}", "missing.npz"),
        ("{folder} --out {out}", "is a folder; take {trace}"),
        ("{other} --out {out}", "samples.npz"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(flags, shown, traced, tmp_path, capsys):
    places = dict(trace=folder_of(traced) / "trace.npz", other=folder_of(traced) / "samples.npz", out=tmp_path / "out")
    places["folder"] = places["trace"].parent
    assert shown.format(**places) in refused(plot_trace.main, flags.format(**places).split(), capsys)
    assert not (tmp_path / "out").exists()
