"""The inspector's program: traces as pages, what a page keeps to itself, its cores, and how it ends."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request

import numpy as np
import pytest
import torch

from models.families import SIZES
from sampling.inspector.export import as_npz
from sampling.inspector.view import page, page_of
from sampling.inspector.work import share_cores
from scripts import inspector
from tests.helpers import untrained
from tests.helpers_inspector import made, steps_of, tiny_gallery
from tests.test_cli import refused


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """A file of the growth of two images."""
    path = tmp_path_factory.mktemp("trace") / "trace.npz"
    path.write_bytes(as_npz(*made(tiny_gallery())))
    return path


def content_of(text: str) -> dict:
    """What a page knows from the start."""
    return json.loads(text.partition('id="content">')[2].partition("</script>")[0])


def test_a_trace_becomes_a_page(trace, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert inspector.main(["--trace", str(trace), "--export", str(out)]) == 0
    events = content_of(out.read_text())["events"]
    assert len(steps_of(events)) == 4 and steps_of(events)[0]["images"][0]["tau"][0] == 1
    assert inspector.main(["--trace", str(trace), "--export", str(out)]) == 0  # it is ours to replace


def test_what_is_not_ours_is_not_replaced(trace, tmp_path, capsys):
    (tmp_path / "thesis.html").write_text("<!doctype html>\n<title>Thesis</title>")
    for place in (tmp_path / "thesis.html", trace, tmp_path):
        assert f"--export {place} " in refused(inspector.main, ["--trace", str(trace), "--export", str(place)], capsys)
    assert "Thesis" in (tmp_path / "thesis.html").read_text()


FOREIGN = {
    "an array is missing": lambda arrays: arrays.pop("tau"),
    "steps beyond the frames": lambda arrays: arrays.update(order_step=arrays["order_step"] + 9),
    "steps that are no numbers": lambda arrays: arrays.update(order_step=arrays["order_step"].astype(str)),
    "flat frames": lambda arrays: arrays.update(frames=arrays["frames"][..., 0]),
    "frames of floats": lambda arrays: arrays.update(frames=arrays["frames"] / 255),
    "labels that are names": lambda arrays: arrays.update(labels=np.array(["a", "b"])),
    "another number of images": lambda arrays: arrays.update(cfg=arrays["cfg"][:1]),
    "no images": lambda arrays: arrays.update({name: array[:0] for name, array in arrays.items()}),
    "no numbers": lambda arrays: arrays.update(tau=np.full_like(arrays["tau"], np.nan)),
}


@pytest.mark.parametrize("change", FOREIGN.values(), ids=FOREIGN)
def test_another_file_is_no_trace(change, trace, tmp_path, capsys):
    with np.load(trace) as file:
        arrays = dict(file)
    change(arrays)
    np.savez(tmp_path / "x.npz", **arrays)
    line = refused(inspector.main, ["--trace", str(tmp_path / "x.npz"), "--export", str(tmp_path / "y.html")], capsys)
    assert line == f"error: {tmp_path / 'x.npz'} is not a trace written by sample.py --save_trace"


def test_a_lone_array_and_a_damaged_file_are_no_traces(trace, tmp_path, capsys):
    np.save(tmp_path / "one.npy", np.zeros(3))
    content = bytearray(trace.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    (tmp_path / "cut.npz").write_bytes(content)
    for name in ("one.npy", "cut.npz"):
        words = ["--trace", str(tmp_path / name), "--export", str(tmp_path / "y.html")]
        assert "is not a trace" in refused(inspector.main, words, capsys)


@pytest.mark.parametrize(
    "name", ["</script><script>alert(1)</script>", "{{script}}", "{{content}}", "\\1 \\g<0>", "\udcff"]
)
def test_a_name_in_a_page_stays_a_name(name):
    text = page_of([{"begin": {"name": name}}])
    assert "<script>alert" not in text and content_of(text)["events"][0]["begin"]["name"] == name
    assert re.sub('id="content">.*', "", text, count=1) == re.sub('id="content">.*', "", page({}), count=1)


def test_checkpoints_of_one_name_are_told_apart(tmp_path):
    assert inspector.names_of([str(tmp_path / "a" / "x"), str(tmp_path / "b" / "x")]) == ["x", "x 2"]
    assert inspector.names_of(["q/a", "q/a 3", "r/a", "s/a", "a 2"]) == ["a", "a 3", "a 2", "a 4", "a 2 2"]


def test_an_export_beside_a_checkpoint_is_refused(trace, tmp_path, capsys):
    words = ["--trace", str(trace), "--export", str(tmp_path / "x.html"), "--checkpoint", "runs/x"]
    assert "without --checkpoint runs/x" in refused(inspector.main, words, capsys)
    assert not (tmp_path / "x.html").exists()


def test_an_unknown_model_of_a_published_file_is_one_line_with_all_that_are_known(capsys):
    """Which is longer than those of tests/test_bad_input.py may be."""
    line = refused(inspector.main, ["--checkpoint", "x.pth", "--model", "nope"], capsys)
    assert "--model" in line and "'nope'" in line and all(size in line for size in SIZES)


def test_it_draws_with_half_of_the_cores(monkeypatch):
    """In all of its threads."""
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(4), raising=False)
    try:
        torch.set_num_threads(3)
        share_cores()
        other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        other.start()
        other.join()
        assert seen == [2] == [torch.get_num_threads()]
        torch.set_num_threads(1)
        share_cores()
        assert torch.get_num_threads() == 1  # as OMP_NUM_THREADS says
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_in_the_middle_of_an_image_ends_it(number, tmp_path, trace, capsys):
    """And its port is taken until then."""
    place = untrained(tmp_path / "run")
    program = [sys.executable, inspector.__file__, "--checkpoint", str(place), "--port", "0"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # tests that were started in the background ignore SIGINT, and so would their programs
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(program, **pipes, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        address = process.stdout.readline().strip()
        if number == signal.SIGINT:
            port = address.strip("/").rpartition(":")[2]
            line = refused(inspector.main, ["--trace", str(trace), "--port", port], capsys)
            assert line == f"error: --host 127.0.0.1 --port {port} cannot be listened on: Address already in use"
        asked = json.dumps({"settings": {"num_iter": "64", "num_sampling_steps": "200"}, "labels": [1]})
        head = {"Content-Type": "application/json"}
        answer = urllib.request.urlopen(urllib.request.Request(f"{address}api/run", asked.encode(), head), timeout=60)
        while b'"begin"' not in answer.readline():
            pass
        process.send_signal(number)
        assert process.wait(timeout=30) == 130
        assert process.stderr.read() == "interrupted\n"
    finally:
        process.kill()
