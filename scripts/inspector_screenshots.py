"""Pictures of the inspector for docs/inspector.md, by a headless Chromium, which its tests drive too.

python scripts/inspector_screenshots.py --checkpoint output_dir/quickstart/heads --out docs

Writes inspector_watch.png, inspector_compare.png, inspector_branch.png. Chromium is Debian's: apt-get install chromium
"""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from util.args import OneLineParser
from util.checkpoint import atomic_file
from util.door import run_main
from util.images.folders import check_output_folder

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --mute-audio --hide-scrollbars"
)
FLAGS += " --disable-background-networking --disable-component-update --disable-sync --no-default-browser-check"


KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Enter": 13, "Home": 36, "End": 35, " ": 32}


class Browser:
    """One page of a Chromium, driven over the two pipes of its --remote-debugging-pipe.

    errors: those of the page's scripts. profile: a folder for what it keeps.
    """

    def __init__(self, profile):
        commands, self.write_end = os.pipe()
        self.read_end, answers = os.pipe()
        line = f'exec "$0" {FLAGS} --remote-debugging-pipe --user-data-dir="$1" about:blank 3<&{commands} 4>&{answers}'
        options = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(commands, answers))
        self.process = subprocess.Popen(["bash", "-c", line, CHROMIUM, str(profile)], **options)
        os.close(commands)
        os.close(answers)
        self.number, self.buffer, self.session, self.errors = 0, b"", None, []
        self.events = []
        self.tab()

    def tab(self) -> str:
        """A new tab, in which all that follows is done, until `session` is another one's; its session."""
        self.session = None  # the browser's own
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        return self.session

    def close(self):
        """End the browser."""
        self.process.terminate()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        os.close(self.write_end)
        os.close(self.read_end)

    def call(self, method: str, **params) -> dict:
        """The result of a command of the DevTools protocol."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.write_end, data) :]
        while True:
            answer = self.receive(30)
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def receive(self, seconds: float) -> dict:
        """The next message; errors in the page are noted."""
        until = time.monotonic() + seconds
        while b"\0" not in self.buffer:
            ready, *_ = select.select([self.read_end], [], [], max(0, until - time.monotonic()))
            data = os.read(self.read_end, 2**20) if ready else b""
            if not data:
                raise TimeoutError("the browser does not answer")
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(line)
        if message.get("method") == "Runtime.exceptionThrown":
            details = message["params"]["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        entry = message["params"]["entry"] if message.get("method") == "Log.entryAdded" else {}
        if entry.get("level") == "error" and entry["source"] != "network":  # a refusal is no error of the page
            self.errors.append(entry["text"])
        return message

    def open(self, address: str) -> None:
        """Go to an address, as a new page."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=address)
        self.wait("location.href !== 'about:blank' && document.readyState === 'complete'")

    def js(self, expression: str):
        """The value of an expression in the page."""
        options = dict(returnByValue=True, awaitPromise=True, userGesture=True)
        result = self.call("Runtime.evaluate", expression=expression, **options)
        if "exceptionDetails" in result:
            raise AssertionError(
                result["exceptionDetails"].get("exception", {}).get("description", "error in the page")
            )
        return result["result"].get("value")

    def wait(self, expression: str, seconds: float = 30) -> None:
        """Until an expression is true."""
        until = time.monotonic() + seconds
        while not self.js(f"Boolean({expression})"):
            assert time.monotonic() < until, f"it never was: {expression}"
            select.select([], [], [], 0.02)

    def size(self, width: int, height: int, dark: bool = False, scale: float = 1) -> None:
        """The window, and whether its user likes the dark."""
        options = dict(width=width, height=height, deviceScaleFactor=scale, mobile=False)
        self.call("Emulation.setDeviceMetricsOverride", **options)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, whole: bool = False) -> bytes:
        """A PNG of what is seen, or of the whole page."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"])

    def press(self, key: str, text: str | None = None) -> None:
        """A key."""
        options = dict(key=key, code=key, windowsVirtualKeyCode=KEYS.get(key, 0))
        self.call("Input.dispatchKeyEvent", type="keyDown", **options, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **options)

    def drag(self, selector: str, *places) -> None:
        """Press the mouse at the first place (0…1, 0…1) of an element, move to the others, let go."""
        place = f"document.querySelector({selector!r})"
        self.js(f"{place}.scrollIntoView({{block: 'center'}})")
        box = self.js(f"(r => [r.x, r.y, r.width, r.height])({place}.getBoundingClientRect())")
        points = [(box[0] + x * box[2], box[1] + y * box[3]) for x, y in places]
        mouse = dict(button="left", clickCount=1)
        for i, (x, y) in enumerate(points):
            self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y, buttons=1 if i else 0)
            if i == 0:
                self.call("Input.dispatchMouseEvent", type="mousePressed", x=x, y=y, **mouse)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", x=points[-1][0], y=points[-1][1], **mouse)


SPEC = {"checkpoint": "heads", "settings": {"infer_mode": "both", "num_iter": "8"}, "labels": [3], "seed": 4, "sure": 8}
OTHER = {**SPEC, "settings": {"order": "halton", "num_iter": "8"}}
# name -> (what the address says, what is done in the page, the element that is shown; None: the top)
SHOTS = {
    "watch": ({"view": "watch", "a": SPEC}, "go(4); selectToken(27)", None),
    "compare": (
        {"view": "compare", "a": SPEC, "b": {**SPEC, "settings": {"order": "halton", "num_iter": "8"}}},
        "0",
        None,
    ),
    "branch": ({"view": "watch", "a": SPEC}, "$('branch-all').click()", "branching"),
}


def take(browser: Browser, address: str, name: str) -> bytes:
    """The PNG of one of SHOTS, of the inspector at an address."""
    what, action, place = SHOTS[name]
    browser.open(f"{address}#{quote(json.dumps(what))}")
    browser.wait("document.body.dataset.done && !state.busy", 120)
    browser.js(f"void ({action})".replace("; ", ", "))
    browser.wait("!state.busy", 120)
    if place is not None:
        browser.js(f"$('{place}').scrollIntoView({{block: 'center'}})")
    return browser.screenshot()


def main(argv=None) -> int:
    """Serve, look, write; returns the exit code."""
    parser = OneLineParser(prog="inspector_screenshots.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, help="one with heads, of the digits, in a folder named heads")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    args = parser.parse_args(argv)
    if CHROMIUM is None:
        raise ValueError("there is no chromium on this machine: apt-get install chromium")
    check_output_folder("out", args.out)
    program = [sys.executable, str(Path(__file__).with_name("inspector.py"))]
    server = subprocess.Popen(
        [*program, "--checkpoint", args.checkpoint, "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    try:
        address = server.stdout.readline().strip()
        if not address:
            raise ValueError(f"--checkpoint {args.checkpoint} is not served: the line above says why")
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            browser = Browser(profile)
            try:
                browser.size(1280, 860)
                for name in SHOTS:
                    args.out.mkdir(parents=True, exist_ok=True)
                    path = args.out / f"inspector_{name}.png"
                    with atomic_file(path) as temporary:
                        temporary.write_bytes(take(browser, address, name))
                    print(path)
            finally:
                browser.close()
    finally:
        server.terminate()
        server.wait(timeout=20)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
