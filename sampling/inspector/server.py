"""The inspector's server: a page, and a few questions that it asks in JSON. Python's own HTTP server is enough.

POST /api/run      a request (`sampling.inspector.spec.Spec`): its steps, a line of JSON each, while they happen
POST /api/branch   {"spec", "image", "steps", "count"}: one line a step with what was drawn from there on
POST /api/match    {"spec", "target"}: settings with the evaluations of the target
POST /api/measure  {"spec", "num_images"}: the figures of sample.py
POST /api/export   {"spec", "format"}: a file

A client that leaves ends its work. What cannot be is {"error": line}, with a status of 400 and above or as the last
line of those that had begun.
"""

import hmac
import json
import queue
import re
import select
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs

from sampling.inspector import view
from sampling.inspector.branching import MOST_STEPS_TRIED, branch, matched
from sampling.inspector.export import FORMATS
from sampling.inspector.measuring import LEAST, MOST, Measuring
from sampling.inspector.recording import Recording, record
from sampling.inspector.spec import MOST_IMAGES, Loaded, Spec, number, positions_of, read_spec, whole
from sampling.inspector.work import Busy, Job, Recent, Worker, line_of

LOOPBACK = ("127.0.0.1", "localhost", "::1")
OWN_HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?")  # at any port: a tunnel may begin at another one
MOST_BYTES = 8 * 2**20  # of a request
MOST_EVALS = 1e12  # of an image, that settings are looked for
MOST_WAITING = 8  # jobs, beside the one that is worked on
MOST_CONNECTIONS = 64
SECONDS = 30  # that a client may take to send its request, or to take an answer


class Questions:
    """What the page may ask; each method takes a request and gives work(emit), having checked all that it can."""

    def __init__(self, gallery: dict[str, Loaded]):
        self.gallery, self.recent, self.measuring = gallery, Recent(), Measuring()

    def recorded(self, spec: Spec, emit: Callable) -> Recording:
        """The recording of a request, made if it is not among the recent ones. On the worker's thread only."""
        return self.recent.get(spec.text, lambda: record(spec, emit))

    def run(self, request: dict) -> Callable:
        """Make images."""
        spec = read_spec(request, self.gallery)

        def work(emit):
            emit(view.beginning(spec))
            again = spec.text in self.recent.values
            recording = self.recorded(spec, emit)
            for event in recording.events if again else ():
                emit(event)
            emit(view.ending(recording))

        return work

    def branch(self, request: dict) -> Callable:
        """Draw what follows some steps again and again."""
        spec = read_spec({**_part(request, "spec"), "redo": []}, self.gallery)
        image = whole(request, "image", 0, 0, len(spec.labels) - 1)
        count = whole(request, "count", 8, 1, MOST_IMAGES)
        steps = positions_of(request, "steps", spec.sampling.num_iter + 1)

        def work(emit):
            recording = self.recorded(spec, emit)
            for step in steps:
                made = branch(spec, recording, image, step, count, emit=lambda event: emit({"progress": True}))
                pictures = {"images": view.sheet(made.images), "mean": view.data_url(made.mean.round().astype("uint8"))}
                pictures["spread"] = view.data_url(made.picture_of_spread)
                emit({"branched": step, "value": round(float(made.spread.mean()), 4), **pictures})

        return work

    def match(self, request: dict) -> Callable:
        """Find steps with the same evaluations."""
        spec, wanted = read_spec(_part(request, "spec"), self.gallery), _part(request, "target")
        target = {name: number(wanted, name, MOST_EVALS) for name in ("mar", "mlp")}
        if None in target.values():
            raise ValueError("target must be a JSON object with the numbers mar and mlp")

        def work(emit):
            found, evals = matched(spec, target, emit)
            emit({"matched": found.texts, "evals": evals, "most": MOST_STEPS_TRIED})

        return work

    def measure(self, request: dict) -> Callable:
        """Figures of many images."""
        spec = read_spec(_part(request, "spec"), self.gallery)
        number = whole(request, "num_images", 200, LEAST, MOST)
        return lambda emit: self.measuring.measure(spec, number, emit)

    def export(self, request: dict) -> Callable:
        """A file; its event is {"file", "type"}."""
        spec, name = read_spec(_part(request, "spec"), self.gallery), request.get("format")
        if not isinstance(name, str) or name not in FORMATS:
            raise ValueError(f"unknown format {name!r}; valid: {', '.join(FORMATS)}")
        make, content_type = FORMATS[name]
        return lambda emit: emit({"file": make(spec, self.recorded(spec, emit)), "type": content_type})


def _part(request: dict, name: str) -> dict:
    if not isinstance(request.get(name), dict):
        raise ValueError(f"the request must have {name}, a JSON object")
    return request[name]


def object_of(body: bytes) -> dict:
    """The JSON object of a request; ValueError for anything else."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("the request is no JSON") from None
    if not isinstance(request, dict):
        raise ValueError("a request must be a JSON object")
    return request


class Inspector(ThreadingHTTPServer):
    """Serves one page and its questions at (host, port) until it is shut down.

    token: what a request must carry, None for no need of it. content: what the page knows from the start.
    """

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = MOST_CONNECTIONS  # with fewer, those that come together wait for seconds

    def __init__(self, host: str, port: int, gallery: dict[str, Loaded], content: dict, token: str | None = None):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.questions, self.worker, self.token = Questions(gallery), Worker(MOST_WAITING), token
        self.page = view.page(content).encode()
        self.room = threading.BoundedSemaphore(MOST_CONNECTIONS)
        super().__init__((host, port), Handler)  # which calls server_close where it cannot listen

    def process_request_thread(self, request, client_address):
        """Answer one connection; one too many is refused."""
        if not self.room.acquire(blocking=False):
            self.refuse(request)
            return
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.room.release()

    def refuse(self, request):
        """Tell a connection that there is no room for it, and close it."""
        content = json.dumps({"error": f"{MOST_CONNECTIONS} connections are open already: try again later"}).encode()
        status = HTTPStatus.SERVICE_UNAVAILABLE
        head = f"HTTP/1.0 {status.value} {status.phrase}\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(content)}\r\n\r\n"
        with suppress(OSError):
            request.settimeout(1)
            request.recv(2**16)  # a question that is left unread would reset the connection, and its answer be lost
            request.sendall(head.encode() + content)
        self.shutdown_request(request)

    def handle_error(self, request, client_address):
        """A client that has gone is no error; another exception is printed."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    def server_close(self):
        """Stop listening, and end what is being worked on."""
        super().server_close()
        self.questions.measuring.stop()
        self.worker.stop()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Inspector
    timeout = SECONDS
    server_version, sys_version = "inspector", ""

    def log_message(self, format, *args):
        """The terminal stays empty."""

    def do_GET(self):
        """The page."""
        place, _, query = self.path.partition("?")
        if place != "/":
            return self.fail(HTTPStatus.NOT_FOUND, "there is only one page, /")
        given = parse_qs(query).get("token", [""])[0]
        if self.is_allowed(given, from_page=False):
            self.answer(HTTPStatus.OK, "text/html; charset=utf-8", self.server.page)

    def do_POST(self):
        """A question."""
        if not self.is_allowed(self.headers.get("X-Token", ""), from_page=True):
            return
        body = self.body()
        if body is None:
            return
        name = self.path.removeprefix("/api/")
        if name not in ("run", "branch", "match", "measure", "export"):
            return self.fail(HTTPStatus.NOT_FOUND, f"there is no question {name[:40]!r}")
        try:
            work = getattr(self.server.questions, name)(object_of(body))
        except Exception as error:
            return self.fail(HTTPStatus.BAD_REQUEST, line_of(error))
        try:
            job = self.start(name, work)
        except Busy as error:
            return self.fail(HTTPStatus.SERVICE_UNAVAILABLE, str(error))
        try:
            self.file(job) if name == "export" else self.lines(job)
        finally:
            job.cancelled.set()

    def start(self, name: str, work) -> Job:
        """The job of a question: in the worker's queue, or, where another process does the work, at once."""
        if name != "measure":
            return self.server.worker.submit(work)
        job = Job(work)
        threading.Thread(target=job.run, daemon=True).start()
        return job

    def is_allowed(self, token: str, from_page: bool) -> bool:
        """Is the request from our page (from_page: must it be), and has it the token? If not it is answered."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if self.server.token is None and not OWN_HOST.fullmatch(host):
            return self.fail(HTTPStatus.FORBIDDEN, "this server answers under its own address only")
        other = origin is not None and origin != f"http://{host}"
        if from_page and (other or self.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none")):
            return self.fail(HTTPStatus.FORBIDDEN, "this server answers its own page only")
        if self.server.token is not None and not hmac.compare_digest(token.encode(), self.server.token.encode()):
            return self.fail(HTTPStatus.FORBIDDEN, "the token is missing or wrong: open the address that was printed")
        return True

    def body(self) -> bytes | None:
        """The request's content; None where it was refused."""
        length, content_type = self.headers.get("Content-Length", ""), self.headers.get("Content-Type", "")
        if not re.fullmatch("[0-9]{1,18}", length) or content_type.split(";")[0] != "application/json":
            return self.fail(HTTPStatus.BAD_REQUEST, "a question is JSON of a stated length") or None
        if int(length) > MOST_BYTES:
            for _ in range(min(int(length), 16 * MOST_BYTES) // 2**16):  # a browser reads an answer after it has sent
                if not self.rfile.read(2**16):
                    break
            too_long = f"the upload has {int(length)} bytes, at most {MOST_BYTES} are taken"
            return self.fail(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, too_long) or None
        return self.rfile.read(int(length))

    def lines(self, job: Job) -> None:
        """The events of a job, a line each, as they come; until the last one, or until the client has left."""
        self.head(HTTPStatus.OK, "application/x-ndjson")
        for event in self.events(job):
            self.wfile.write(view.encoded(event))

    def file(self, job: Job) -> None:
        """The file that a job makes."""
        made = {}
        for event in self.events(job):
            made |= {name: event[name] for name in ("file", "type", "error") if name in event}
        if "file" not in made:
            return self.fail(HTTPStatus.BAD_REQUEST, made.get("error", "nothing was made"))
        self.answer(HTTPStatus.OK, made["type"], made["file"])

    def events(self, job: Job):
        """What a job has to say, until it ends or the client has left."""
        while not self.has_left():
            try:
                event = job.events.get(timeout=0.2)
            except queue.Empty:
                continue
            if event is None:
                return
            yield event

    def has_left(self) -> bool:
        """Has the client closed its end?"""
        try:
            readable, *_ = select.select([self.connection], [], [], 0)
            return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def fail(self, status: HTTPStatus, line: str) -> bool:
        """Answer with an error of one line; False."""
        self.answer(status, "application/json", json.dumps({"error": line}).encode())
        return False

    def answer(self, status: HTTPStatus, content_type: str, content: bytes) -> None:
        """Answer with this content."""
        self.head(status, content_type, len(content))
        self.wfile.write(content)

    def head(self, status: HTTPStatus, content_type: str, length: int | None = None) -> None:
        """The answer's first lines."""
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in (("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff")):
            self.send_header(name, value)
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Referrer-Policy", "no-referrer")
        self.end_headers()
