"""What the address of the inspector's page holds, in a real browser, Debian's Chromium; skipped where there is none."""

import json
from urllib.parse import quote, unquote

import numpy as np
import pytest

from tests.helpers_browser import (
    FIXTURES,
    IN_A_BROWSER,
    SETTINGS,
    click,
    done,
    images_of,
    set_value,
    shown,
    text,
    value,
)

pytestmark = IN_A_BROWSER
browser, gallery, server, page = FIXTURES


def test_share(page, gallery):
    """The address alone gives the same image, in a page that knows nothing else."""
    page.show(steer=[{"step": 1, "cfg": 3.0}])
    first, address = text(page, "hash"), value(page, "address")
    assert json.loads(unquote(address.partition("#")[2]))["a"]["steer"] == [{"step": 1, "cfg": 3.0}]
    page.open(address)
    done(page)
    assert text(page, "hash") == first != "–"
    assert np.array_equal(shown(page), images_of(gallery, steer=[{"step": 1, "cfg": 3.0}])[0, :, :, 0])
    command = value(page, "command")
    assert command.startswith("python sample.py --checkpoint runs/mar") and "--cfg=2" in command


def test_an_address_of_another_image_says_so(page):
    """As from a server whose checkpoint of the same name has other weights."""
    page.show()
    made = text(page, "hash")
    what = json.loads(unquote(value(page, "address").partition("#")[2]))
    assert what["hash"] == {"a": made}
    for run, view in (("a", "watch"), ("b", "compare")):
        page.open(f"{page.root}#{quote(json.dumps({**what, 'b': what['a'], 'view': view, 'hash': {run: '<b>0'}}))}")
        done(page, 1)
        page.wait("$('error').textContent")
        line = text(page, "error")
        assert "not the image that was shared" in line and f"{run.upper()} has hash {made}, the address <b>0;" in line
    for odd in (5, [], {"a": made, "c": "x"}):
        page.open(f"{page.root}#{quote(json.dumps({**what, 'hash': odd}))}")
        done(page)
        assert text(page, "error") == "" and text(page, "hash") == made


def test_another_address_in_the_same_tab_is_another_page(page, gallery):
    page.show()
    page.js("document.title = 'old'")
    address = f"{page.root}#{quote(json.dumps({'a': {**A, 'seed': 99}}))}"
    page.call("Page.navigate", url=address)  # not through about:blank, as Browser.open goes
    page.wait("document.title !== 'old' && document.readyState === 'complete'")
    done(page)
    assert value(page, "a-seed") == "99"
    assert np.array_equal(shown(page), images_of(gallery, seed=99)[0, :, :, 0])


def test_prompts_are_part_of_the_address(page, gallery):
    page.open(page.root)
    assert page.js("$('a-prompts').offsetParent === null && $('a-classes').offsetParent !== null")
    set_value(page, "a-checkpoint", "text")
    assert page.js("$('a-prompts').offsetParent !== null && $('a-classes').offsetParent === null")
    for name, new in {
        "prompts": "A <b>seven\n\na two",
        "images": "2",
        "seed": "5",
        "num_iter": "3",
        "cfg": "2",
    }.items():
        set_value(page, f"a-{name}", new)
    click(page, "generate")
    done(page)
    first, prompts = text(page, "hash"), ["A <b>seven", "a two"]
    assert text(page, "steer-label-name") == "prompt" and "prompts.txt" in text(page, "command-note")
    page.open(value(page, "address"))
    done(page)
    assert text(page, "hash") == first != "–" and value(page, "a-prompts").splitlines() == prompts
    asked = dict(checkpoint="text", settings={"num_iter": "3", "cfg": "2"}, prompts=prompts, labels=[0, 1])
    assert np.array_equal(shown(page)[:, :8], images_of(gallery, **asked)[0, :, :, 0])
    set_value(page, "steer-label", "1")
    done(page, 2)
    assert "prompt a two" in text(page, "changes").lower() and text(page, "error") == ""
    set_value(page, "a-prompts", "")
    click(page, "generate")
    done(page, 3)
    assert text(page, "error") == "prompt 1 of 1 has no text"


A = {"checkpoint": "mar", "settings": SETTINGS, "labels": [1], "seed": 5}
ADDRESSES = {
    "a list": [A],
    "no checkpoint": {"a": {}},
    "a checkpoint that is not there": {"a": {**A, "checkpoint": "<img src=x onerror=alert(1)>"}},
    "a setting that is not there": {"a": {**A, "settings": {"nope": "1"}}},
    "an order that is not there": {"a": {**A, "settings": {"order": "zigzag"}}},
    "a number for a text": {"a": {**A, "settings": {"num_iter": 4}}},
    "labels that are no list": {"a": {**A, "labels": "1"}},
    "no labels": {"a": {**A, "labels": []}},
    "a seed that is no number": {"a": {**A, "seed": "x"}},
    "changes that are none": {"a": {**A, "steer": [5]}},
    "a region that is none": {"a": {**A, "redo": [{}]}},
    "an upload that is none": {"a": {**A, "edit": "x"}},
    "a key of another kind": {"a": {**A, "constructor": 1}},
    "another B": {"a": A, "b": {**A, "steer": {}}, "view": "compare"},
    "prompts out of turn": {"a": {"checkpoint": "text", "prompts": ["a", "b"], "labels": [1]}},
    "no prompts": {"a": {"checkpoint": "text"}},
}


@pytest.mark.parametrize("what", ADDRESSES.values(), ids=ADDRESSES)
def test_an_address_that_cannot_be_shows_a_line_and_no_other_image(page, what):
    page.open(f"{page.root}#{quote(json.dumps(what))}")
    assert text(page, "error").startswith(("the address ", "this server ")) and not page.js(
        "state.busy || state.runs.a"
    )
    page.open(page.root)


def test_an_address_of_what_only_the_server_can_judge(page):
    for changes, line in (({"labels": [9]}, "from -1 to 2"), ({"steer": [{"step": 99}]}, "step 100 on")):
        page.open(f"{page.root}#{quote(json.dumps({'a': {**A, **changes}, 'image': -7, 'step': 1e9}))}")
        done(page)
        assert line in text(page, "error") and page.js("state.runs.a") is None
    page.open(f"{page.root}#{quote(json.dumps({'a': A, 'image': 99, 'step': 1, 'view': '__proto__'}))}")
    done(page)
    assert text(page, "error") == "" and "step 2 of 4" in text(page, "readout") and page.js("state.image") == 0


def test_what_is_shown_is_what_is_branched_and_shared(page):
    """Whatever the form says by then."""
    page.show()
    address = unquote(value(page, "address"))
    set_value(page, "a-seed", "6")
    click(page, "copy-address")
    assert unquote(value(page, "address")) == address
    click(page, "branch")
    done(page, 2)
    once = page.js("[...spreads.entries()].join()")
    set_value(page, "a-seed", "5")
    click(page, "branch")
    done(page, 3)
    assert page.js("[...spreads.entries()].join()") == once
    set_value(page, "a-seed", "6")
    click(page, "generate")
    done(page, 4)
    set_value(page, "scrubber", "1", "input")
    click(page, "branch")
    done(page, 5)
    assert page.js("[...spreads.keys()].join()") == "1"  # and none of the image before
