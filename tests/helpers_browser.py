"""The inspector's page in a real browser, for its tests: fixtures, and what a user does and sees."""

import base64
import io
import json
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from sampling.inspector.recording import record
from sampling.inspector.spec import read_spec
from scripts.inspector_screenshots import CHROMIUM, Browser
from tests.helpers_inspector import serving, tiny_gallery

IN_A_BROWSER = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium"),
    pytest.mark.slow,  # a second or more each, most of it the browser's
]
SETTINGS = {"num_iter": "4", "cfg": "2"}


@pytest.fixture(scope="module")
def gallery():
    return tiny_gallery()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    browser.size(1280, 900)
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def server(gallery):
    with serving(gallery) as server:
        yield server


@pytest.fixture
def page(browser, server):
    """The browser, and a function that opens what a page's address says; nothing may fail in the page's script."""
    browser.errors.clear()
    root = f"http://127.0.0.1:{server.server_address[1]}/"

    def show(view="watch", **more):
        what = {"view": view, "a": {"checkpoint": "mar", "settings": SETTINGS, "labels": [1], "seed": 5, **more}}
        browser.open(f"{root}#{quote(json.dumps(what))}")
        done(browser)
        assert text(browser, "error") == ""

    browser.show, browser.root = show, root
    yield browser
    assert browser.errors == []


FIXTURES = browser, gallery, server, page  # a module of tests has those that it names


def done(browser, times: int = 1) -> None:
    """Until so many things have ended in the page."""
    browser.wait(f"Number(document.body.dataset.done || 0) >= {times} && !state.busy")


def text(browser, place: str) -> str:
    """The text of the element of this id."""
    return browser.js(f"$('{place}').textContent")


def value(browser, place: str) -> str:
    """The value of the field of this id."""
    return browser.js(f"$('{place}').value")


def click(browser, place: str) -> None:
    """Press the button of this id."""
    browser.js(f"$('{place}').click()")


def set_value(browser, place: str, new, event: str = "change") -> None:
    """Give the field of this id a value, as its user would."""
    browser.js(f"$('{place}').value = {json.dumps(new)}; $('{place}').dispatchEvent(new Event('{event}'))")


def images_of(gallery, view: str = "a", **request) -> np.ndarray:
    """What the loop makes of a request."""
    spec = read_spec({"checkpoint": "mar", "settings": SETTINGS, "labels": [1], "seed": 5, **request}, gallery)
    return record(spec, lambda event: None, frames=False).images


def shown(browser, run: str = "a") -> np.ndarray:
    """The finished picture (H, W) of a run in the page, its pixels as the server sent them."""
    url = browser.js(f"state.runs.{run}.end.images.url")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))
