"""The inspector's server: what it answers and what it refuses, and that it minds itself."""

import base64
import io
import json
import socket
import threading
import time

import numpy as np
import pytest
from PIL import Image

from sampling.inspector.branching import matched
from sampling.inspector.server import MOST_CONNECTIONS
from sampling.inspector.work import Busy, Cancelled, Worker
from sampling.trace import load_trace
from tests.helpers_inspector import QUICK, Client, end_of, made, picture, request, serving, steps_of, tiny_gallery
from tests.test_untrusted import bomb


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


@pytest.mark.parametrize("family", QUICK)
def test_a_run_is_told_step_by_step(family, client, gallery):
    events = client.run(**request(family))
    assert [*events[0]] == ["waiting"] and "begin" in events[2] and events[2]["begin"]["labels"] == [1, 2]
    assert [event["step"] for event in steps_of(events)] == list(range(len(steps_of(events))))
    assert end_of(events)["hash"] == end_of(client.run(**request(family)))["hash"]
    _, recording = made(gallery, family)
    sheet = Image.open(io.BytesIO(base64.b64decode(end_of(events)["images"]["url"].partition(",")[2])))
    height, width = recording.images.shape[1:3]
    assert np.array_equal(np.asarray(sheet)[:height, :width], recording.images[0].squeeze(-1))


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
    ({"settings": {"temperature": "1e39"}}, "temperature", "at most 3.4e+38"),
    ({"settings": {"refresh_every": "9" * 20}}, "refresh_every", "at most 100000000"),
    ({"checkpoint": "x" * 10**5}, "unknown checkpoint", "x'"),
    ({"settings": {"order": "x" * 10**5}}, "order", "…"),
    ({"labels": [3]}, "from -1 to 2", "'3'"),
    ({"labels": []}, "1 to 64"),
    ({"labels": [0] * 65}, "1 to 64"),
    ({"seed": -1}, "seed", "'-1'"),
    ({"nope": 1}, "'nope'"),
    ({"steer": [{"step": 4}]}, "steered from step 5 on", "steps 1 to 4", "undo"),
    ({"steer": [{"step": -1}]}, "step", "'-1'", "from 0 to 4095"),
    ({"steer": [{"step": 1, "label": 3}]}, "steered from step 2 on", "'3'", "from -1 to 2"),
    ({"redo": [{"region": [64]}]}, "made again", "'64'", "from 0 to 63"),
    ({"steer": [{"step": 1, "tau": "x"}]}, "tau", "'x'"),
    ({"steer": [{"step": 1, "next": [64]}]}, "next", "'64'"),
    ({"steer": [{"step": 1, "next": [1]}], "checkpoint": "mar_ar", "settings": {}}, "painted", "one"),
    ({"redo": [{"region": []}]}, "region", "paint"),
    ({"redo": [{"region": [3]}], "checkpoint": "causal_gpt", "settings": {}}, "raster"),
    ({"redo": [{"region": [1], "nope": 1}]}, "'nope'", "region, seed"),
    ({"edit": 5}, "edit", "JSON object"),
    ({"edit": {"image": "!", "region": [1]}}, "base64"),
    ({"edit": {"image": "é", "region": [1]}}, "base64"),
    ({"edit": {"image": "AAAA", "region": [1], "nope": 1}}, "'nope'"),
    ({"seed": 2**53}, "seed", "9007199254740991"),
    ({"prompts": ["a seven"]}, "prompts", "of classes"),
    ({"checkpoint": "text", "settings": {}}, "prompts", "of text"),
    ({"checkpoint": "text", "settings": {}, "prompts": ["a", " <b> "]}, "prompt 2 of 2 has no text"),
    ({"checkpoint": "text", "settings": {}, "prompts": ["a" * 1001]}, "at most 1000"),
    ({"checkpoint": "text", "settings": {}, "prompts": ["a", "b"], "labels": [2]}, "from -1 to 1"),
    ({"edit": {"image": picture((9, 8)), "region": [1]}}, "9x8", "8x8"),
    ({"checkpoint": "wide", "edit": {"image": picture(), "region": [1]}}, "has 8x8 pixels", "16x8"),
    ({"checkpoint": "wide", "settings": {"order": "halton"}}, "--order halton is of square"),
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


def raw(client, text: bytes) -> bytes:
    """What the server answers to these bytes."""
    with socket.create_connection(("127.0.0.1", client.port), timeout=10) as connection:
        connection.sendall(text)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(2**16), b""))


@pytest.mark.parametrize("body", [b"", b"[]", b"\xff", b'{"seed": ' + b"9" * 5000 + b"}", b'{"a":' * 20000])
def test_what_is_no_json_object_is_refused(client, body, capfd):
    status, content = client.send("POST", "/api/run", body, **{"Content-Type": "application/json"})
    assert status == 400 and "JSON" in json.loads(content)["error"] and not capfd.readouterr().err


@pytest.mark.parametrize(
    "line", ["GET http://[ HTTP/1.0", "GET /../etc/passwd HTTP/1.0", "POST http://x/api/run HTTP/1.0"]
)
@pytest.mark.parametrize("length", ["2", "9" * 5000, "-1", "\xb2", ""])
def test_odd_requests_are_one_line_and_leave_no_trace(client, line, length, capfd):
    head = f"{line}\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    answer = raw(client, head.encode("latin-1") + b"{}")
    assert answer.startswith((b"HTTP/1.0 404", b"HTTP/1.0 400")) and "error" in json.loads(answer.splitlines()[-1])
    assert not capfd.readouterr().err


@pytest.mark.parametrize("target", [{"mar": float("nan"), "mlp": 1}, {"mar": 4, "mlp": 1e999}, {"mar": -1, "mlp": 1},
                                    {"mar": True, "mlp": 1}, {"mar": 4, "mlp": 10**400}])  # fmt: skip
def test_evaluations_that_cannot_be_are_refused(client, target):
    assert "must be a number from 0 to 1e+12" in client.error("match", {"spec": request(), "target": target})


@pytest.mark.filterwarnings("ignore:Image size")
def test_a_bomb_is_refused_unopened(client, tmp_path):
    data = base64.b64encode(bomb(tmp_path / "x.png", side=13000).read_bytes()).decode()
    began = time.monotonic()
    line = client.error("run", request(edit={"image": data, "region": [1]}))
    assert "13000x13000 pixels" in line and time.monotonic() - began < 5


def test_prompts_are_what_labels_number(client, gallery):
    asked = dict(checkpoint="text", settings={"cfg": "2", "num_iter": "3"}, prompts=["A  seven", "a two"], seed=5)
    one, two, none = (client.run(**asked, labels=[label] * 4) for label in (0, 1, -1))
    assert one[2]["begin"]["names"] == ["a seven"] * 4 and one[2]["begin"]["classes"] == ["a seven", "a two"]
    assert len({end_of(events)["hash"] for events in (one, two, none)}) == 3
    assert two[2]["begin"]["command"] is None  # sample.py takes the prompts in turn
    in_turn = client.run(**asked, labels=[0, 1, 0])
    assert "--prompts=prompts.txt --num_images 3" in in_turn[2]["begin"]["command"]
    alone = client.run(**asked | dict(prompts=["a two"]), labels=[0] * 4)  # between them other prompts were drawn
    assert "'--prompts=a two'" in alone[2]["begin"]["command"]
    assert end_of(alone)["hash"] == end_of(two)["hash"]
    steered = client.run(**asked, labels=[0] * 4, steer=[{"step": 0, "label": 1}])
    assert end_of(steered)["hash"] == end_of(two)["hash"]
    branches = client.events("branch", {"spec": {**asked, "labels": [1]}, "steps": [1], "count": 2})
    assert branches[-1]["branched"] == 1
    assert "not measured" in client.error("measure", {"spec": {**asked, "labels": [1]}, "num_images": 4})
    assert client.ask("export", {"spec": {**asked, "labels": [0, 1]}, "format": "png"})[0] == 200


def test_only_its_own_page_is_answered(client):
    own = f"http://127.0.0.1:{client.port}"
    assert client.ask("run", request(), Origin=own)[0] == 200
    assert client.ask("run", request(), Origin="http://elsewhere.org")[0] == 403
    assert client.ask("run", request(), Host="elsewhere.org")[0] == 403
    assert client.ask("run", request(), **{"Sec-Fetch-Site": "cross-site"})[0] == 403
    assert client.ask("run", request(), **{"Content-Type": "text/plain"})[0] == 400
    assert client.send("GET", "/", Host="elsewhere.org")[0] == 403
    assert client.send("GET", "/", Host="localhost.elsewhere.org")[0] == 403
    for host in ("localhost", "[::1]:9000"):  # of --port 80, of a tunnel from another port
        assert client.send("GET", "/", Host=host)[0] == 200
    assert client.ask("run", request(), Host="localhost:9000", Origin=own)[0] == 403


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


def test_a_request_whose_client_has_left_takes_no_place_in_the_queue():
    begin, worker, made = threading.Event(), Worker(2), []
    first = worker.submit(lambda emit: begin.wait(10))
    while worker.current is None:
        pass
    for _ in range(5):
        gone = worker.submit(lambda emit: made.append(1))
        assert gone.events.get() == {"waiting": 1}
        gone.cancelled.set()
    begin.set()
    while first.events.get(timeout=10) is not None:
        pass
    worker.stop()
    assert not made
    with pytest.raises(Busy, match="stopped"):
        worker.submit(lambda emit: None)


def test_a_search_for_steps_ends_when_its_client_leaves(gallery):
    """Within a trial, which may have many steps."""
    spec, steps = made(gallery)[0], []

    def emit(event):
        steps.append(event)
        if len(steps) == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        matched(spec, {"mar": 200, "mlp": 1}, emit)
    assert [*steps[-1]] == ["progress"]


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


def test_one_connection_too_many_is_refused_in_a_line(gallery):
    with serving(gallery) as server:
        client = Client(server)
        idle = [socket.create_connection(("127.0.0.1", client.port)) for _ in range(MOST_CONNECTIONS)]
        try:
            until = time.monotonic() + 10
            while server.room._value and time.monotonic() < until:
                time.sleep(0.01)
            status, content = client.ask("run", request())
            assert status == 503 and "64 connections" in json.loads(content)["error"]
        finally:
            for connection in idle:
                connection.close()
