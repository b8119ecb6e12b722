"""The inspector without a browser: what is steered and what is not, branches, files, and a server that minds itself."""

import base64
import io
import json
import socket
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import sample
from sampling.inspector.branching import branch, matched
from sampling.inspector.recording import hand_made_rules, record
from sampling.inspector.spec import read_spec
from sampling.inspector.view import page_of
from sampling.inspector.work import Busy, Worker
from sampling.run import SamplingRun
from sampling.trace import load_trace
from scripts import inspector
from tests.helpers import untrained
from tests.helpers_inspector import Client, end_of, serving, steps_of, tiny_gallery
from util.images.pictures import read_png

FAMILIES = ("mar", "ids", "mar_ar", "causal_gpt", "var", "maskgil")
QUICK = (*FAMILIES[:3], pytest.param("causal_gpt", marks=pytest.mark.slow), "var", "maskgil")
FREE = ("mar", "ids", "maskgil")  # those whose groups are free


@pytest.fixture(scope="module")
def gallery():
    return tiny_gallery()


@pytest.fixture(scope="module")
def server(gallery):
    with serving(gallery) as server:
        yield server


@pytest.fixture
def client(server):
    return Client(server)


def request(family="mar", **more) -> dict:
    settings = {"cfg": "2", **({"num_iter": "4"} if family in FREE else {}), **more.pop("settings", {})}
    return {"checkpoint": family, "settings": settings, "labels": [1, 2], "seed": 5, **more}


def made(gallery, family="mar", **more):
    """(Spec, Recording) of a request."""
    spec = read_spec(request(family, **more), gallery)
    return spec, record(spec, lambda event: None)


class Silent:
    """In the place of a trace and of a progress bar."""

    steps = ()

    def record(self, *arguments):
        pass

    set_postfix_str = record


def picture(shape=(8, 8), value=200) -> str:
    """A grey picture as a request has it."""
    file = io.BytesIO()
    Image.new("L", shape, value).save(file, format="png")
    return base64.b64encode(file.getvalue()).decode()


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
    side = gallery[family].model.config.grid
    _, plain = made(gallery, family)
    region = [side * side - 2, side * side - 1]
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


# ----------------------------------------------------------------------------------------------------- the server


@pytest.mark.parametrize("family", QUICK)
def test_a_run_is_told_step_by_step(family, client, gallery):
    events = client.run(**request(family))
    assert [*events[0]] == ["waiting"] and "begin" in events[2] and events[2]["begin"]["labels"] == [1, 2]
    assert [event["step"] for event in steps_of(events)] == list(range(len(steps_of(events))))
    assert end_of(events)["hash"] == end_of(client.run(**request(family)))["hash"]
    _, recording = made(gallery, family)
    sheet = Image.open(io.BytesIO(base64.b64decode(end_of(events)["images"]["url"].partition(",")[2])))
    assert np.array_equal(np.asarray(sheet)[:, :8], recording.images[0].squeeze(-1))


def test_another_server_makes_the_same_image(client, gallery):
    asked = request(steer=[{"step": 2, "tau": 0.5}], redo=[{"region": [3], "seed": 1}])
    with serving(gallery) as other:
        assert end_of(Client(other).run(**asked))["hash"] == end_of(client.run(**asked))["hash"]


def test_branches_come_one_step_after_the_other(client):
    events = client.events("branch", {"spec": request(), "image": 1, "steps": [0, 3], "count": 3})
    done = [event for event in events if "branched" in event]
    assert [event["branched"] for event in done] == [0, 3] and done[0]["value"] > done[1]["value"] >= 0


def test_files_are_what_they_say(client, gallery, tmp_path):
    _, recording = made(gallery)
    for name in ("npz", "png", "gif", "html"):
        status, content = client.ask("export", {"spec": request(), "format": name})
        assert status == 200
        (tmp_path / f"x.{name}").write_bytes(content)
    trace = load_trace(tmp_path / "x.npz")
    assert np.array_equal(trace["order_step"], recording.order_step) and trace["labels"].tolist() == [1, 2]
    assert np.array_equal(trace["frames"][:, -1], recording.images) and trace["group_size"].sum() == 128
    assert Image.open(tmp_path / "x.png").size == (2 * 68 + 4, 88) and Image.open(tmp_path / "x.gif").n_frames == 4
    text = (tmp_path / "x.html").read_text()
    assert (
        text.startswith("<!doctype html>") and '"begin"' in text and "http://" not in text.replace("http://www.w3", "")
    )
    assert "GIF" in client.error("export", {"spec": request("var"), "format": "gif"})


BAD = [
    ({"checkpoint": "nope"}, "'nope'", "mar, ids"),
    ({"settings": {"order": "zigzag"}}, "'zigzag'", "halton"),
    ({"settings": {"order": "confidence"}}, "confidence", "ids"),
    ({"settings": {"infer_mode": "both"}, "checkpoint": "ids"}, "learned"),
    ({"settings": {"num_iter": "0"}}, "'0'", "at least 1"),
    ({"settings": {"num_iter": "99999"}}, "99999", "4096"),
    ({"settings": {"schedule": "/etc/passwd"}}, "a page names no files"),
    ({"settings": {"nope": "1"}}, "'nope'", "temperature"),
    ({"settings": {"smooth": "True"}}, "'smooth'"),
    ({"settings": {"cfg": 2}}, "text"),
    ({"labels": [3]}, "from -1 to 2", "'3'"),
    ({"labels": []}, "1 to 64"),
    ({"labels": [0] * 65}, "1 to 64"),
    ({"seed": -1}, "seed", "'-1'"),
    ({"nope": 1}, "'nope'"),
    ({"steer": [{"step": 4}]}, "step", "'4'", "from 0 to 3"),
    ({"steer": [{"step": 1, "tau": "x"}]}, "tau", "'x'"),
    ({"steer": [{"step": 1, "next": [64]}]}, "next", "'64'"),
    ({"steer": [{"step": 1, "next": [1]}], "checkpoint": "mar_ar", "settings": {}}, "painted", "one"),
    ({"redo": [{"region": []}]}, "region", "paint"),
    ({"redo": [{"region": [3]}], "checkpoint": "causal_gpt", "settings": {}}, "raster"),
    ({"edit": {"image": "!", "region": [1]}}, "base64"),
    ({"edit": {"image": picture((9, 8)), "region": [1]}}, "9x8", "8x8"),
    ({"edit": {"image": base64.b64encode(b"no picture").decode(), "region": [1]}}, "cannot be read"),
]


@pytest.mark.parametrize("changes, shown", [(changes, shown) for changes, *shown in BAD])
def test_what_cannot_be_is_one_line(changes, shown, client):
    line = client.error("run", request() | changes)
    assert all(text in line for text in shown), line


def test_other_questions_are_refused_in_a_line_too(client):
    assert "format" in client.error("export", {"spec": request(), "format": "exe"})
    assert "target" in client.error("match", {"spec": request()})
    assert "from 0 to 1" in client.error("branch", {"spec": request(), "image": 2})
    steered = request(steer=[{"step": 1, "tau": 0.5}])
    assert "not measured" in client.error("measure", {"spec": steered, "num_images": 4})
    status, content = client.send("POST", "/api/run", b"{" * 5000, **{"Content-Type": "application/json"})
    assert status == 400 and json.loads(content)["error"] == "the request is no JSON"
    assert client.ask("nope", {})[0] == 404 and client.send("GET", "/etc/passwd")[0] == 404


def test_only_its_own_page_is_answered(client):
    own = f"http://127.0.0.1:{client.port}"
    assert client.ask("run", request(), Origin=own)[0] == 200
    assert client.ask("run", request(), Origin="http://elsewhere.org")[0] == 403
    assert client.ask("run", request(), Host="elsewhere.org")[0] == 403
    assert client.ask("run", request(), **{"Sec-Fetch-Site": "cross-site"})[0] == 403
    assert client.ask("run", request(), **{"Content-Type": "text/plain"})[0] == 400
    assert client.send("GET", "/", Host="elsewhere.org")[0] == 403


def test_a_token_opens_a_server_that_others_can_reach(gallery):
    with serving(gallery, token="secret") as server:
        client = Client(server)
        assert client.send("GET", "/")[0] == 403 and client.send("GET", "/?token=secre")[0] == 403
        assert client.send("GET", "/?token=secret")[0] == 200
        assert client.ask("run", request())[0] == 403
        assert client.ask("run", request(), **{"X-Token": "secret"})[0] == 200


def test_a_large_upload_is_refused(client):
    status, content = client.send("POST", "/api/run", b" " * (9 * 2**20), **{"Content-Type": "application/json"})
    assert status == 413 and "9437184 bytes" in json.loads(content)["error"]


def test_a_full_queue_says_so():
    begin, jobs = threading.Event(), []
    worker = Worker(2)
    jobs.append(worker.submit(lambda emit: begin.wait(10)))
    while worker.current is None:
        pass
    jobs += [worker.submit(lambda emit: emit({"n": 1})) for _ in range(2)]
    with pytest.raises(Busy, match="2 requests wait"):
        worker.submit(lambda emit: None)
    begin.set()
    for job in jobs:
        while job.events.get(timeout=10) is not None:
            pass
    worker.stop()
    assert not worker.thread.is_alive()


def test_a_client_that_leaves_ends_its_work(server, client):
    """And the next one is answered."""
    long = json.dumps(request(settings={"num_iter": "64", "num_sampling_steps": "200"})).encode()
    head = f"POST /api/run HTTP/1.0\r\nHost: 127.0.0.1:{client.port}\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", client.port)) as connection:
        connection.sendall(head.encode() + f"Content-Length: {len(long)}\r\n\r\n".encode() + long)
        text = b""
        while b'"step"' not in text:
            text += (part := connection.recv(2**16))
            assert part, text
        job = server.worker.current
    began = time.monotonic()
    assert end_of(client.run(**request())) and job.cancelled.is_set()
    assert time.monotonic() - began < 20


def test_one_measurement_at_a_time_is_made_by_sample_py(gallery, monkeypatch, tmp_path):
    """A program stands in for it, which notes its command."""
    program = tmp_path / "sample.py"
    row = {"metrics": {"fid": 1.5}, "mar_evals": 8.0, "settings": {}}
    program.write_text(
        "import sys, pathlib\nout = pathlib.Path(sys.argv[sys.argv.index('--output_dir') + 1])\n"
        f"(out / 'results.jsonl').write_text({json.dumps(row)!r})\n"
        f"pathlib.Path({str(tmp_path / 'words')!r}).write_text(' '.join(sys.argv[1:]))\n"
    )
    monkeypatch.setattr("sampling.inspector.measuring.PROGRAM", program)
    with serving(gallery) as server:
        client = Client(server)
        events = client.events("measure", {"spec": request(labels=[0]), "num_images": 12})
        assert events[-1]["measured"]["metrics"] == {"fid": 1.5}
        words = (tmp_path / "words").read_text()
        assert "--checkpoint runs/mar" in words and "--num_images 12" in words and "--cfg=2" in words
        server.questions.measuring.one.acquire()
        assert "already" in client.error("measure", {"spec": request(labels=[0]), "num_images": 12})
        server.questions.measuring.one.release()
        program.write_text("import sys\nsys.exit('error: --metrics fid cannot be')")
        assert "--metrics fid cannot be" in client.error("measure", {"spec": request(), "num_images": 12})


# ----------------------------------------------------------------------------------------------------- the program


def test_a_trace_becomes_a_page(gallery, client, tmp_path, capsys):
    (tmp_path / "trace.npz").write_bytes(client.ask("export", {"spec": request(), "format": "npz"})[1])
    out = tmp_path / "page.html"
    assert inspector.main(["--trace", str(tmp_path / "trace.npz"), "--export", str(out)]) == 0
    text = out.read_text()
    events = json.loads(text.partition('id="content">')[2].partition("</script>")[0])["events"]
    assert len(steps_of(events)) == 4 and steps_of(events)[0]["images"][0]["tau"][0] == 1
    assert inspector.main(["--trace", str(tmp_path / "trace.npz"), "--export", str(out)]) == 0  # it is ours to replace


def test_what_is_in_a_page_stays_text():
    text = page_of([{"begin": {"name": "</script><script>alert(1)</script>"}}])
    assert "<script>alert" not in text


def test_checkpoints_of_one_name_are_told_apart(tmp_path):
    assert inspector.names_of([str(tmp_path / "a" / "x"), str(tmp_path / "b" / "x")]) == ["x", "x 2"]


def test_settings_without_steering_have_no_wrapper_of_their_own(gallery):
    """The same rules answer, whether somebody watches or not."""
    spec, recording = made(gallery)
    again = record(replace(spec, changes=()), lambda event: None, frames=False)
    assert np.array_equal(again.images, recording.images) and again.frames == [None] * 4
