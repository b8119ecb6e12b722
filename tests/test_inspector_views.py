"""The three views of the inspector's page show one state, in a real browser, Debian's Chromium."""

import json
import time

import numpy as np
import pytest

from sampling.trace import load_trace
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
)
from tests.helpers_inspector import Client, picture, request

pytestmark = IN_A_BROWSER
browser, gallery, server, page = FIXTURES
PIXELS = "pixels($('{}')).data.reduce((sum, value) => sum + value)"


def test_a_view_that_is_opened_shows_the_last_run(page):
    page.show()
    picture, first = page.js(PIXELS.format("picture")), text(page, "hash")
    click(page, "tab-compare")
    set_value(page, "a-seed", "6")
    click(page, "generate")
    done(page, 2)
    click(page, "tab-watch")
    assert page.js(PIXELS.format("picture")) != picture and text(page, "hash") != first
    page.show("compare")
    click(page, "tab-watch")
    assert "step 4 of 4" in text(page, "readout") and page.js("$('curves').children.length") == 6
    set_value(page, "a-seed", "7")
    click(page, "generate")  # of another seed than B
    done(page, 2)
    click(page, "tab-compare")
    assert text(page, "compare-a-text").startswith("A, step 4 of 4") and text(page, "compare-b-text") == "B"
    assert page.js(PIXELS.format("compare-b")) == page.js(PIXELS.format("compare-difference")) == 0
    click(page, "tab-batch")
    assert text(page, "batch-verdict")


def test_compare_chooses_among_its_images(page, gallery):
    page.show(labels=[1, 2, 1, 2])
    page.js("document.querySelectorAll('#strip button')[3].click()")
    click(page, "tab-compare")
    set_value(page, "b-cfg", "1")
    click(page, "generate")
    done(page, 2)
    last = page.js(PIXELS.format("compare-a"))
    page.js("document.querySelectorAll('#compare-strip button')[1].focus()")
    page.press("Enter", "\r")
    assert page.js("state.image") == 1 and page.js("document.activeElement.getAttribute('aria-label')") == (
        "Image 2, of class 2"
    )
    assert page.js(PIXELS.format("compare-a")) != last
    page.js("document.querySelectorAll('#compare-strip button')[3].click()")
    set_value(page, "a-images", "1")  # the fourth is no more
    click(page, "generate")
    done(page, 3)
    assert page.js("state.image") == 0 and page.js(PIXELS.format("compare-a")) > 0
    assert np.array_equal(shown(page, "b"), images_of(gallery, settings={**SETTINGS, "cfg": "1"})[0, :, :, 0])


def test_evaluations_that_b_cannot_have_are_said(page):
    page.show("compare", settings={**SETTINGS, "num_sampling_steps": "1"})
    click(page, "generate")
    done(page, 2)
    click(page, "equal")
    done(page, 4)
    page.wait("$('status').textContent === 'B took the evaluations of A.'")
    set_value(page, "a-cfg", "1")
    set_value(page, "a-num_iter", "3")
    set_value(page, "b-cfg", "2")  # an even number of backbone evaluations
    click(page, "generate")
    done(page, 5)
    click(page, "equal")
    done(page, 7)
    page.wait("$('status').textContent.startsWith('Not equal: B took ')")
    assert "backbone evaluations, A 3" in text(page, "status") and "up to 256" in text(page, "status")


@pytest.fixture
def program(monkeypatch, tmp_path):
    """In the place of sample.py: notes its command, waits for a file named `go`, and has an fid of its own seed."""
    path, row = tmp_path / "sample.py", {"metrics": {"fid": 0}, "mar_evals": 8.0, "settings": {}}
    path.write_text(
        "import json, pathlib, sys, time\n"
        "value = lambda name: sys.argv[sys.argv.index(name) + 1]\n"
        "here = pathlib.Path(__file__).parent\n"
        "(here / 'asked').open('a').write(value('--seed') + ' ')\n"
        "while not (here / 'go').exists(): time.sleep(0.05)\n"
        f"row = {row!r}\n"
        "row['metrics']['fid'] = 1000 + int(value('--seed'))\n"
        "(pathlib.Path(value('--output_dir')) / 'results.jsonl').write_text(json.dumps(row))\n"
    )
    monkeypatch.setattr("sampling.inspector.measuring.PROGRAM", path)
    return tmp_path


def compared(page) -> None:
    """A and B are generated."""
    page.show("compare")
    set_value(page, "b-cfg", "1")
    click(page, "generate")
    done(page, 2)


def test_measured_figures_stand_beside_the_settings_that_they_are_of(page, program):
    compared(page)
    click(page, "measure")
    page.wait("$('status').textContent.includes('images to measure')")
    set_value(page, "a-seed", "6")
    click(page, "generate")  # A's measurement goes on
    done(page, 3)
    (program / "go").touch()
    page.wait("!measuring")
    assert (program / "asked").read_text() == "5 5 "
    assert "other settings" in text(page, "status") and "fid" not in text(page, "compare-table")
    set_value(page, "a-seed", "5")
    click(page, "generate")
    done(page, 4)
    assert "fid10051005" in text(page, "compare-table") and "images measured200200" in text(page, "compare-table")
    click(page, "measure")
    page.wait("!measuring")
    assert text(page, "status") == "Measured: as sample.py does." and text(page, "error") == ""


def test_a_measurement_is_cancelled(page, server, program):
    page.open(page.root)
    click(page, "tab-compare")
    click(page, "measure")
    assert "generate A and B first" in text(page, "error")
    compared(page)
    click(page, "measure")
    page.wait("$('status').textContent.includes('images to measure')")
    process = server.questions.measuring.process
    assert page.js("$('measure').disabled && !$('measure-cancel').disabled")
    click(page, "measure-cancel")
    page.wait("!measuring")
    assert text(page, "status") == "Measuring was cancelled." and page.js("$('measure-cancel').disabled")
    process.wait(timeout=10)


def test_the_defaults_that_are_shown_are_those_that_are_used(page, gallery):
    page.open(page.root)
    first = "$('a-{}').options[0].textContent"
    assert page.js(first.format("order")) == "default (random)"
    for mode, solver in (("both", "dpmpp"), ("", "ddpm"), ("policy", "")):
        set_value(page, "a-infer_mode", mode)
        set_value(page, "a-solver", solver)
        used = gallery["mar"].setting({k: v for k, v in (("infer_mode", mode), ("solver", solver)) if v})
        for name in ("order", "group", "tau_schedule", "cfg_schedule", "spacing"):
            assert page.js(first.format(name)) == f"default ({getattr(used, name)})", (mode, name)
    page.show(settings={**SETTINGS, "infer_mode": "both"})
    assert page.js(first.format("order")) == "default (learned)"
    set_value(page, "a-checkpoint", "ids")  # which has no heads
    assert page.js(first.format("infer_mode")) == "default (baseline)"


def test_a_change_that_is_refused_is_taken_back(page, gallery):
    page.show()
    set_value(page, "scrubber", "3", "input")
    set_value(page, "steer-label", "2")
    done(page, 2)
    page.js(f"state.upload = {json.dumps(picture((9, 9)))}, state.painted.add(3)")
    click(page, "edit")
    done(page, 3)
    assert "9x9 pixels" in text(page, "error") and "not done" in text(page, "status")
    assert text(page, "changes") == "from step 4: class class 2undo"
    click(page, "generate")
    done(page, 4)
    assert text(page, "error") == ""
    steer = [{"step": 3, "label": 2}]
    assert np.array_equal(shown(page), images_of(gallery, steer=steer)[0, :, :, 0])
    set_value(page, "a-num_iter", "2")
    click(page, "generate")
    done(page, 5)
    assert text(page, "error") == (
        "what is steered from step 4 on cannot be: there are steps 1 to 2; undo it, or take more steps"
    )
    page.js("document.querySelector('#changes button').click()")
    done(page, 6)
    assert text(page, "error") == "" and "step 2 of 2" in text(page, "readout")


def test_a_number_that_cannot_be_is_shown_where_it_stands(page):
    page.open(page.root)
    for place, new, line in (
        ("a-sure", "20", "sure must be a whole number from 0 to 16, got 20"),
        ("a-images", "65", "images must be a whole number from 1 to 64, got 65"),
        ("a-seed", "", "seed must be a whole number of at least 0, got none"),
    ):
        old = page.js(f"$('{place}').value")
        set_value(page, place, new)
        click(page, "generate")
        assert text(page, "error") == line and page.js(f"document.activeElement.id === '{place}'")
        assert page.js(f"Boolean($('{place}').offsetParent) && !state.busy")
        set_value(page, place, old)
    assert page.js("document.querySelector('#form-a details').open")


def test_a_batch_says_the_values_of_each_class(page):
    page.show("batch", labels=[0, 2, 0, -1], settings={**SETTINGS, "infer_mode": "both"})
    rows = page.js(
        "[...document.querySelectorAll('#batch-classes tr')].map((row) => [...row.cells].map((c) => c.textContent))"
    )
    assert rows[0] == ["class", "images", "tokens a step", "τ", "w"]
    assert [row[:2] for row in rows[1:]] == [["any", "1"], ["class 0", "2"], ["class 2", "1"]]
    steps = page.js("state.runs.a.steps.map((step) => step.images.filter((item) => [0, 2].includes(item.image)))")
    items = [item for step in steps for item in step if item["positions"]]
    means = [np.mean([np.mean(item[name]) for item in items]) for name in ("tau", "cfg")]
    means.insert(0, np.mean([len(item["positions"]) for item in items]))
    assert [float(cell) for cell in rows[2][2:]] == pytest.approx(means, rel=1e-3)
    colours = page.js("[...document.querySelectorAll('.swatch')].map((one) => one.style.background)")
    assert len(set(colours)) == 3
    many = page.js("[...Array(64).keys()].map((i) => classColour({begin: {labels: [...Array(64).keys()]}}, i))")
    assert len(set(many)) == 64


def test_batch_leaves_the_form_as_it_is(page):
    page.open(page.root)
    set_value(page, "a-classes", "2")
    for name in ("batch", "watch"):
        click(page, f"tab-{name}")
        assert page.js("[$('a-classes').value, $('a-images').value]") == ["2", "1"]
    click(page, "tab-batch")
    set_value(page, "a-num_iter", "2")
    click(page, "batch-fill")
    done(page)
    assert page.js("state.runs.a.begin.labels") == [i % 3 for i in range(20)]


def test_colours_are_those_of_the_run_and_of_the_scheme(page):
    page.show("compare")
    colours = "[...new Set([...document.querySelector('#compare-curves svg').querySelectorAll('{}')].map((one) => "
    colours += "getComputedStyle(one).{}))]"
    lines, dots = page.js(colours.format("path", "stroke")), page.js(colours.format("circle", "fill"))
    assert len(lines) == 2 and lines == dots
    page.show("batch", labels=[0, 1])
    light = page.js("$('batch-strip').toDataURL()")
    try:
        page.size(1280, 900, dark=True)
        page.wait(f"$('batch-strip').toDataURL() !== {json.dumps(light)}")
    finally:
        page.size(1280, 900)


def test_address_and_command_are_copied(page):
    page.show()
    permission = dict(origin=page.root.rstrip("/"), permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    page.call("Browser.grantPermissions", **permission)
    page.call("Page.bringToFront")
    for what in ("address", "command"):
        page.js("$('status').textContent = ''")
        click(page, f"copy-{what}")
        page.wait("$('status').textContent")
        assert text(page, "status") == "Copied."
        assert page.js("navigator.clipboard.readText()") == page.js(f"$('{what}').value") != ""


def test_files_are_exported_from_the_page(page, server, tmp_path):
    page.show(labels=[1, 2])
    page.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    set_value(page, "a-seed", "6")  # not what is shown
    for name in ("npz", "png", "gif", "html"):
        page.js(f"document.querySelector('[data-export={name}]').click()")
        page.wait(f"$('status').textContent === 'Exported inspector.{name}.'")
        path = tmp_path / f"inspector.{name}"
        until = time.monotonic() + 10
        while not path.exists() and time.monotonic() < until:
            time.sleep(0.05)
        status, content = Client(server).ask("export", {"spec": request(seed=5), "format": name})
        assert status == 200 and (path.read_bytes() == content or name in ("npz", "html")), name
    assert np.array_equal(load_trace(tmp_path / "inspector.npz")["labels"], [1, 2])
    page.open((tmp_path / "inspector.html").as_uri())
    done(page)
    assert "seed\n5" in page.js("$('about').innerText")
    page.show(checkpoint="var", settings={"cfg": "2"})
    page.js("document.querySelector('[data-export=gif]').click()")
    page.wait("$('error').textContent")
    assert "GIF" in text(page, "error") and "not done" in text(page, "status")
