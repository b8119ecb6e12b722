"""A headless Chromium that tests drive, over the two pipes of its --remote-debugging-pipe."""

import base64
import json
import os
import select
import shutil
import subprocess
import time

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --mute-audio --hide-scrollbars"
)
FLAGS += " --disable-background-networking --disable-component-update --disable-sync --no-default-browser-check"


class Browser:
    """One page of a Chromium; errors of its scripts are kept in `errors`."""

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
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

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


KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Enter": 13, "Home": 36, "End": 35, " ": 32}
