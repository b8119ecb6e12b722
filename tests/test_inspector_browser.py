"""The inspector in a real browser, Debian's Chromium; skipped where there is none."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sampling.inspector.export import as_html
from sampling.inspector.recording import record
from sampling.inspector.spec import read_spec
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


def test_generate_and_scrub(page, gallery):
    page.open(page.root)
    set_value(page, "a-classes", "1")
    set_value(page, "a-seed", "5")
    for name, new in SETTINGS.items():
        set_value(page, f"a-{name}", new)
    click(page, "generate")
    done(page)
    assert np.array_equal(shown(page), images_of(gallery)[0, :, :, 0])
    assert "step 4 of 4" in text(page, "readout") and value(page, "progress") == 1
    pixels = "[...$('picture').getContext('2d').getImageData(0, 0, 320, 320).data].reduce((a, b) => a + b)"
    before = page.js(pixels)
    set_value(page, "scrubber", "1", "input")
    assert "step 2 of 4" in text(page, "readout") and page.js(pixels) != before
    page.js("document.activeElement.blur()")
    for key, step in (("ArrowLeft", 1), ("ArrowRight", 2), ("ArrowRight", 3), ("End", 4), ("Home", 1)):
        page.press(key)
        assert f"step {step} of 4" in text(page, "readout")
    page.press(" ", " ")
    assert text(page, "play") == "❚❚ pause"
    page.wait("state.step === 3 && player === null")


def test_pointing_at_a_token_links_map_picture_and_curve(page):
    page.show(sure=2)
    page.drag("#maps canvas", (0.05, 0.05))
    card = text(page, "token")
    assert "row 1, column 1" in card and "known neighbours" in card and "spread of draws" in card
    assert page.js("state.token") == 0
    step = page.js("tokensOf(state.runs.a, 0).get(0).index")
    line = float(page.js("document.querySelector('#curves .mark').getAttribute('x1')"))
    assert line == pytest.approx(34 + step / 3 * (240 - 34 - 6))
    page.js("$('picture').focus()")
    page.press("ArrowRight")
    assert "row 1, column 2" in text(page, "token")
    assert page.js("document.querySelectorAll('#maps figure:not([hidden])').length") == 5  # no heads in this mode


def test_steer(page, gallery):
    page.show()
    set_value(page, "scrubber", "2", "input")
    set_value(page, "steer-tau", "0.5", "input")
    done(page, 2)
    steer = [{"step": 2, "tau": 0.5}]
    assert np.array_equal(shown(page), images_of(gallery, steer=steer)[0, :, :, 0])
    assert "from step 3: τ 0.5" in text(page, "changes") and "step 3 of 4" in text(page, "readout")
    set_value(page, "steer-label", "2")
    done(page, 3)
    steer[0]["label"] = 2
    assert np.array_equal(shown(page), images_of(gallery, steer=steer)[0, :, :, 0])
    assert "without what was steered" in text(page, "command-note")
    page.js("document.querySelector('input[value=paint]').click()")
    set_value(page, "scrubber", "1", "input")
    late = sorted(page.js("state.runs.a.steps[3].images[0].positions"))[:3]
    for position in late:
        page.drag("#picture", ((position % 8 + 0.5) / 8, (position // 8 + 0.5) / 8))
    assert page.js("[...state.painted]") == late
    click(page, "paint-next")
    done(page, 4)
    assert page.js("state.runs.a.steps[1].images[0].positions") == late
    painted = [{"step": 1, "next": late}, *steer]
    assert np.array_equal(shown(page), images_of(gallery, steer=painted)[0, :, :, 0])
    assert text(page, "changes").startswith("3 painted tokens at step 2")
    page.js("document.querySelector('#changes button').click()")
    done(page, 5)
    assert "painted" not in text(page, "changes") and text(page, "changes").startswith("from step 3")
    assert np.array_equal(shown(page), images_of(gallery, steer=steer)[0, :, :, 0])


def test_a_region_is_made_again_and_an_upload_edited(page, gallery, tmp_path):
    page.show()
    page.js("document.querySelector('input[value=paint]').click()")
    page.drag("#picture", (0.9, 0.9), (0.95, 0.95))
    assert page.js("[...state.painted]") == [63]
    click(page, "paint-redo")
    done(page, 2)
    redo = [{"region": [63], "seed": 1}]
    assert np.array_equal(shown(page), images_of(gallery, redo=redo)[0, :, :, 0])
    page.js("document.querySelector('#changes button').click()")
    done(page, 3)
    for size, error in ((9, "9x9 pixels"), (8, "")):
        Image.new("L", (size, size), 200).save(tmp_path / "x.png")
        node = page.call("DOM.querySelector", nodeId=page.call("DOM.getDocument")["root"]["nodeId"], selector="#upload")
        page.call("DOM.setFileInputFiles", files=[str(tmp_path / "x.png")], nodeId=node["nodeId"])
        page.wait("state.upload")
        page.js("document.body.dataset.done = 0")
        click(page, "edit")
        done(page)
        assert error in text(page, "error") and bool(error) == bool(text(page, "error"))
        page.js("state.upload = null; $('upload').value = ''")
    assert (shown(page).flatten()[:63] == 200).all()


def test_branch(page):
    page.show()
    set_value(page, "branch-count", "3")
    set_value(page, "scrubber", "0", "input")
    click(page, "branch")
    done(page, 2)
    assert page.js("$('branch-images').children.length") == 3 and page.js("spreads.get(0)") > 0
    click(page, "branch-all")
    done(page, 3)
    values = page.js("[...spreads.values()]")
    assert len(values) == 4 and values[0] > values[3] >= 0
    assert page.js("document.querySelectorAll('#branch-curve path').length") == 1


def test_compare(page, gallery):
    page.show("compare", settings={**SETTINGS, "num_sampling_steps": "2"})
    set_value(page, "b-cfg", "1")
    set_value(page, "b-num_iter", "3")
    click(page, "generate")
    done(page, 2)
    other = {"num_iter": "3", "cfg": "1", "num_sampling_steps": "2"}
    assert np.array_equal(shown(page, "b"), images_of(gallery, settings=other)[0, :, :, 0])
    assert "mean" in text(page, "compare-difference-text")
    assert page.js("state.runs.a.end.evals") == {"mar": 8, "mlp": 256}
    assert page.js("state.runs.b.end.evals") == {"mar": 3, "mlp": 128}
    click(page, "equal")
    done(page, 4)
    assert page.js("state.runs.b.end.evals") == {"mar": 8, "mlp": 256}
    assert value(page, "b-num_iter") == "8" and value(page, "b-num_sampling_steps") == "4"


def test_a_batch_shows_whether_rules_are_a_schedule(page):
    page.show("batch", labels=[0, 1, 2, 0, 1, 2])
    assert "schedule" in text(page, "batch-verdict")
    assert page.js("$('batch-strip').width") > 100
    assert page.js("document.querySelectorAll('#batch-curves circle').length") > 60
    assert page.js("variance(state.runs.a, 'cfg')")["steps"] == pytest.approx(1)
    # had each image a w of its own
    page.js("for (const step of state.runs.a.steps) for (const i of step.images) i.cfg = i.cfg.map((w) => w + i.image)")
    page.js("showBatch()")
    assert text(page, "batch-verdict").startswith("Adaptive: w differ")
    shares, w = page.js("variance(state.runs.a, 'cfg')"), page.js("state.runs.a.steps.map((s) => s.images[0].cfg[0])")
    by_steps, by_images = np.var(w), np.var(range(6))
    assert shares["total"] == pytest.approx(by_steps + by_images)
    assert shares["images"] == pytest.approx(by_images / (by_steps + by_images)) and shares["tokens"] == pytest.approx(
        0
    )


@pytest.mark.parametrize("family", ["ids", "var", "mar_ar", "causal_gpt"])
def test_other_families_are_shown(page, gallery, family):
    settings = {"cfg": "2", **({"order": "confidence", "num_iter": "4"} if family == "ids" else {})}
    page.show(checkpoint=family, settings=settings)
    assert np.array_equal(shown(page), images_of(gallery, checkpoint=family, settings=settings)[0, :, :, 0])
    page.drag("#maps canvas", (0.1, 0.1))
    assert "log p" in text(page, "token") and ("scale" in text(page, "readout")) == (family == "var")


@pytest.mark.parametrize("mode, of_heads", [("maskgil", []), ("both", ["order head"])])
def test_maskgil_shows_its_confidence_and_what_its_heads_decide(page, gallery, mode, of_heads):
    settings = {"infer_mode": mode, "num_iter": "4", "cfg": "2"}
    page.show(checkpoint="maskgil", settings=settings)
    assert np.array_equal(shown(page), images_of(gallery, checkpoint="maskgil", settings=settings)[0, :, :, 0])
    titles = page.js("[...document.querySelectorAll('#maps figure:not([hidden]) figcaption')].map(f => f.textContent)")
    expected = ["step", "τ", "w", "rank of its score", "log p", *of_heads]
    assert len(titles) == len(expected) and all(map(str.startswith, titles, expected))
    page.drag("#maps canvas", (0.1, 0.1))
    card = text(page, "token")
    assert "log p" in card and ("order head–" in card) == (mode == "maskgil")


def test_images_that_are_not_square_keep_their_shape(page, gallery):
    asked = dict(checkpoint="wide", settings=SETTINGS)
    page.show(**asked, labels=[1, 2])
    height, width = shown(page).shape
    assert (height, width) == (8, 32)  # two side by side
    for place, size in (("#picture", [320, 160]), ("#maps canvas", [160, 80]), ("#strip canvas", [44, 22])):
        assert page.js(f"(c => [c.width, c.height])(document.querySelector('{place}'))") == size
    for place in ("#picture", "#maps canvas"):  # the room for it in the page
        box = f"document.querySelector('{place}').getBoundingClientRect()"
        width, height = page.js(f"(r => [r.width, r.height])({box})")
        assert width == pytest.approx(2 * height, abs=0.1)
    for place in ("#picture", "#maps canvas"):
        page.drag(place, (0.7, 0.9))
        assert page.js("state.token") == 3 * 8 + 5 and "row 4, column 6" in text(page, "token")
    page.js("$('picture').focus()")
    page.press("ArrowDown")  # there is no row below
    page.press("ArrowRight")
    assert "row 4, column 7" in text(page, "token")
    page.js("document.querySelector('input[value=paint]').click()")
    page.drag("#picture", (0.99, 0.99))
    click(page, "paint-redo")
    done(page, 2)
    images = images_of(gallery, **asked, labels=[1, 2], redo=[{"region": [31], "seed": 1}])
    assert np.array_equal(shown(page), np.concatenate([*images[..., 0]], axis=1))
    page.show("batch", **asked, labels=[1, 2])
    assert page.js("$('batch-strip').height") > 32


def test_paint_that_another_model_has_no_token_for_is_gone(page):
    page.show()
    page.js("document.querySelector('input[value=paint]').click()")
    for place in ((0.01, 0.01), (0.99, 0.99)):
        page.drag("#picture", place)
    assert page.js("[...state.painted]") == [0, 63]
    set_value(page, "a-checkpoint", "wide")
    click(page, "generate")
    done(page, 2)
    assert text(page, "error") == "" and page.js("[...state.painted]") == [0]


def test_pictures_of_two_shapes_have_no_difference(page):
    page.show("compare", checkpoint="wide")
    set_value(page, "b-checkpoint", "mar")
    click(page, "generate")
    done(page, 2)
    assert "different sizes" in text(page, "compare-difference-text")


def test_keys_work_where_the_last_click_was(page):
    page.show()
    page.js("$('generate').focus()")
    page.press("Home")
    assert "step 1 of 4" in text(page, "readout")
    page.press("ArrowRight")
    assert "step 2 of 4" in text(page, "readout")
    page.js("$('tab-watch').focus()")
    page.press("ArrowRight")
    assert page.js("state.view === 'compare' && document.activeElement.id === 'tab-compare'")
    page.press("ArrowLeft")
    assert page.js("state.view") == "watch" and "step 2 of 4" in text(page, "readout")


def test_bad_requests_are_one_line_in_the_page(page):
    page.open(page.root)
    cases = {"a-classes": ("7", "from -1 to 2"), "a-num_iter": ("0", "at least 1"), "a-schedule": ("/x", "no files")}
    for place, (new, shows) in cases.items():
        old = value(page, place)
        page.js("document.body.dataset.done = 0")
        set_value(page, place, new)
        click(page, "generate")
        done(page)
        assert shows in text(page, "error") and "\n" not in text(page, "error")
        set_value(page, place, old)
    page.js("state.edit = {image: 'x'.repeat(9 * 2 ** 20), region: [1]}; document.body.dataset.done = 0")
    click(page, "generate")
    done(page)
    assert "at most 8388608 are taken" in text(page, "error")
    page.open(page.root + "#%7Bcut")
    assert "cut short" in text(page, "error")


def test_it_fits_a_narrow_window_and_the_dark(page):
    page.show()
    light = page.js("getComputedStyle(document.body).backgroundColor")
    try:
        page.size(360, 740, dark=True)
        assert page.js("document.documentElement.scrollWidth") <= 360
        assert page.js("getComputedStyle(document.body).backgroundColor") != light
        unnamed = "[...document.querySelectorAll('input, select, textarea, button')].filter((x) => x.offsetParent && !"
        unnamed += "(x.getAttribute('aria-label') || x.textContent.trim() || (x.labels && x.labels.length))).length"
        assert page.js(unnamed) == 0
    finally:
        page.size(1280, 900)


PLACES = "['picture', 'scrubber', 'strip', 'maps', 'token', 'curves', 'steer', 'branching', 'share']"
PLACES += ".map((id) => Math.round($(id).getBoundingClientRect().top + scrollY))"


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("name, images", [("mar", 1), ("mar", 8), ("ids", 2), ("wide", 2), ("var", 1)])
def test_nothing_jumps_when_an_image_comes(page, width, name, images):
    page.size(width, 900)
    try:
        page.open(page.root)
        set_value(page, "a-checkpoint", name)
        set_value(page, "a-images", str(images))
        if name == "mar":
            set_value(page, "a-num_iter", "4")
            set_value(page, "a-infer_mode", "both" if images > 1 else "")
        before = page.js(PLACES)
        click(page, "generate")
        page.wait("state.runs.a && state.runs.a.steps.length")
        assert page.js(PLACES) == before
        done(page)
        assert text(page, "error") == "" and page.js(PLACES) == before
    finally:
        page.size(1280, 900)


def test_nothing_jumps_when_a_token_is_pointed_at(page):
    page.show()
    for width in (1280, 700, 360):
        page.size(width, 900)
        before = page.js(PLACES)
        for position in (0, 27, 63):
            page.js(f"selectToken({position})")
            assert page.js(PLACES) == before, width
    page.size(1280, 900)


def test_an_exported_page_shows_its_run_without_a_server(page, gallery, tmp_path):
    spec = read_spec({"checkpoint": "mar", "settings": SETTINGS, "labels": [1], "seed": 5}, gallery)
    place = replace(spec.loaded, path="/home/someone/runs/mar", flags=("--vae_path", "/home/someone/vae.pt"))
    spec = replace(spec, loaded=place)
    recording = record(spec, lambda event: None)
    (tmp_path / "page.html").write_bytes(as_html(spec, recording))
    assert b"someone" not in as_html(spec, recording)
    page.open((tmp_path / "page.html").as_uri())
    done(page)
    assert "step 4 of 4" in text(page, "readout") and not page.js("Boolean($('form').offsetParent)")
    assert np.array_equal(shown(page), recording.images[0, :, :, 0])
    about = page.js("$('about').innerText")
    command = "python sample.py --checkpoint mar --vae_path vae.pt "
    for part in ("mar, MAR", "class 1", "seed\n5", "cfg 2", "num_iter 4", "order random", command):
        assert part in about, part
    assert "checkpoint mar" in page.js("document.title") and "seed 5" in page.js("document.title")


def test_cancelling_leaves_a_second_tab_undisturbed(page, gallery):
    page.show()
    first, second = page.session, page.tab()
    page.open(page.root)
    expected = {first: dict(seed=5), second: dict(seed=6)}
    for cancelled, other in ((first, second), (second, first)):
        page.session = cancelled
        for name, new in {"num_iter": "64", "num_sampling_steps": "200"}.items():
            set_value(page, f"a-{name}", new)
        click(page, "generate")
        page.wait("state.runs.a && state.runs.a.begin.settings.num_iter === 64 && state.runs.a.steps.length > 1")
        page.session = other
        for name, new in {"classes": "1", **expected[other], **SETTINGS, "num_sampling_steps": ""}.items():
            set_value(page, f"a-{name}", new)
        click(page, "generate")
        page.wait("$('status').textContent === 'Waiting: 1 in the queue.'")
        page.session = cancelled
        assert page.js("Boolean(state.busy) && !state.runs.a.end")
        click(page, "cancel")
        page.wait("!state.busy && $('status').textContent === 'Cancelled.'")
        made = page.js("state.runs.a.steps.length")
        page.session = other
        page.wait("!state.busy && state.runs.a && state.runs.a.end")
        assert text(page, "error") == "" and "step 4 of 4" in text(page, "readout")
        assert np.array_equal(shown(page), images_of(gallery, **expected[other])[0, :, :, 0])
        page.session = cancelled
        assert page.js("state.runs.a.steps.length") == made < 64 and text(page, "status") == "Cancelled."
    page.session = first
