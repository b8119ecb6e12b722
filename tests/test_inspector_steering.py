"""What is seen and steered in the inspector's page, step by step, in a real browser; skipped where there is none."""

import numpy as np

from sampling.inspector.export import as_npz
from sampling.inspector.view import events_of_trace, json_events
from sampling.trace import load_trace
from tests.helpers_browser import FIXTURES, IN_A_BROWSER, click, done, images_of, set_value, shown, text, value
from tests.helpers_inspector import made, picture, serving

pytestmark = IN_A_BROWSER
browser, gallery, server, page = FIXTURES

VAR = {"checkpoint": "var", "settings": {"cfg": "2"}}


def choose(page, tool: str) -> None:
    """What a click on the picture does."""
    page.js(f"document.querySelector('input[value={tool}]').click()")


# ------------------------------------------------------------------------------------------------- several scales


def test_a_region_of_several_scales_is_made_again(page, gallery):
    page.show(**VAR)
    choose(page, "paint")
    page.drag("#picture", (0.9, 0.9))
    click(page, "paint-redo")
    done(page, 2)
    assert text(page, "error") == "" and "step 4 of 4" in text(page, "readout")
    assert "1 tokens" in text(page, "readout") and "scale 4×4" in text(page, "readout")
    redo = [{"region": [15], "seed": 1}]
    assert np.array_equal(shown(page), images_of(gallery, **VAR, redo=redo)[0, :, :, 0])
    for step, scale in enumerate(("1×1", "2×2", "4×4")):
        set_value(page, "scrubber", str(step), "input")
        assert f"scale {scale}" in text(page, "readout")


def test_an_edit_of_several_scales_names_the_scale_that_it_draws(page):
    page.show(**VAR, edit={"image": picture(), "region": [15]})
    assert "step 1 of 1" in text(page, "readout") and "scale 4×4" in text(page, "readout")
    page.drag("#picture", (0.95, 0.95))
    assert page.js("state.token") == page.js("state.runs.a.steps[0].images[0].positions[0]") == 20
    assert "scale4×4" in text(page, "token") and "step3" in text(page, "token")


# --------------------------------------------------------------------------------------------- while a run goes on

SLOW = {"num_iter": "12", "cfg": "2", "num_sampling_steps": "250"}
GOES_ON = "state.runs.a && state.runs.a.steps.length && !state.runs.a.end"


def test_what_is_dragged_acts_from_one_step_while_the_run_is_made_again(page, gallery):
    page.show(settings=SLOW)
    set_value(page, "scrubber", "9", "input")
    for tau in ("0.5", "0.6", "0.7"):  # each ends the run that the one before began
        set_value(page, "steer-tau", tau, "input")
        page.wait(f"{GOES_ON} && state.steer[0].tau === {tau}")
        assert page.js("state.step") < 9 and text(page, "steer-step") == "step 10"
    set_value(page, "steer-label", "2")
    page.wait(f"{GOES_ON} && state.steer.length === 2")
    page.wait("!state.busy")
    steer = [{"step": 9, "tau": 0.7}, {"step": 9, "label": 2}]
    assert page.js("state.steer") == steer and "step 10 of 12" in text(page, "readout")
    assert np.array_equal(shown(page), images_of(gallery, settings=SLOW, steer=steer)[0, :, :, 0])


def test_what_is_dragged_at_the_newest_step_acts_from_that_one(page):
    page.open(page.root)
    for name, new in SLOW.items():
        set_value(page, f"a-{name}", new)
    click(page, "generate")
    page.wait(f"{GOES_ON} && state.step === 2")
    page.js("$('steer-tau').value = 0.5, $('steer-tau').dispatchEvent(new Event('input'))")
    newest = page.js("state.step")
    page.wait(f"{GOES_ON} && state.steer.length")
    set_value(page, "steer-tau", "0.6", "input")
    page.wait("state.steer.length && state.steer[0].tau === 0.6")
    page.wait("!state.busy")
    assert page.js("state.steer") == [{"step": newest, "tau": 0.6}]
    assert f"step {newest + 1} of 12" in text(page, "readout")


def test_a_run_is_followed_only_by_who_is_at_its_end(page):
    page.open(page.root)
    for name, new in SLOW.items():
        set_value(page, f"a-{name}", new)
    click(page, "generate")
    page.wait("state.runs.a && state.runs.a.steps.length > 3")
    set_value(page, "scrubber", "1", "input")
    count = page.js("state.runs.a.steps.length")
    page.wait(f"state.runs.a.steps.length > {count + 1}")
    assert page.js(GOES_ON) and "step 2 of 12" in text(page, "readout")
    page.js("document.activeElement.blur()")
    page.press("ArrowRight")
    assert "step 3 of 12" in text(page, "readout")
    page.press("End")
    page.wait(f"{GOES_ON} && state.step === state.runs.a.steps.length - 1")
    done(page)
    assert "step 12 of 12" in text(page, "readout")


def test_a_run_that_is_cancelled_before_its_first_step_leaves_the_old_one(page):
    page.show(labels=[0, 1, 2])
    page.js("document.querySelectorAll('#strip button')[2].click()")
    set_value(page, "scrubber", "1", "input")
    set_value(page, "a-num_sampling_steps", "900")
    set_value(page, "a-images", "1")
    first = text(page, "hash")
    click(page, "generate")
    page.wait("$('status').textContent.startsWith('Waiting')")
    click(page, "cancel")
    page.wait("!state.busy")
    assert page.js("state.runs.a.steps.length === 4 && state.image === 2 && Boolean(state.runs.a.end)")
    assert text(page, "status") == "Cancelled." and text(page, "hash") == first
    page.js("document.activeElement.blur()")
    page.press("ArrowRight")
    assert "step 3 of 4" in text(page, "readout") and page.js("$('strip').children.length") == 3
    click(page, "branch")
    done(page, 3)
    assert text(page, "error") == "" and page.js("$('branch-images').children.length") == 8


def test_the_list_of_classes_says_what_acts_and_takes_it_back(page, gallery):
    page.show()
    plain = text(page, "hash")
    set_value(page, "scrubber", "1", "input")
    set_value(page, "steer-label", "2")
    done(page, 2)
    assert text(page, "hash") != plain
    for step, acts in ((0, ""), (1, "2"), (3, "2")):
        set_value(page, "scrubber", str(step), "input")
        assert value(page, "steer-label") == acts
    set_value(page, "steer-tau", "0.5", "input")
    done(page, 3)
    set_value(page, "steer-label", "")
    done(page, 4)
    assert page.js("state.steer") == [{"step": 3, "tau": 0.5}] and "class" not in text(page, "changes")
    assert np.array_equal(shown(page), images_of(gallery, steer=[{"step": 3, "tau": 0.5}])[0, :, :, 0])
    page.js("document.querySelector('#changes button').click()")
    done(page, 5)
    assert text(page, "hash") == plain and value(page, "steer-label") == ""


def test_painted_tokens_that_are_known_are_a_line_and_no_change(page):
    page.show(labels=[1, 2])
    steps = page.js("[0, 1].map((image) => [...tokensOf(state.runs.a, image)].map(([p, token]) => [p, token.step]))")
    of_first, of_second = (dict(tokens) for tokens in steps)
    both = [p for p in range(64) if of_first[p] < 3 and of_second[p] < 3]
    late = next(p for p in range(64) if of_first[p] < 3 and of_second[p] == 3)
    page.js(f"{both}.forEach((position) => state.painted.add(position))")
    click(page, "paint-next")  # at the last of four steps
    line = f"the {len(both)} painted tokens are known before step 4: paint hatched ones, or go to an earlier step"
    assert both and text(page, "error") == line and page.js("state.steer.length") == 0
    page.js(f"state.painted.add({late})")  # known in one of the images only
    click(page, "paint-next")
    done(page, 2)
    assert text(page, "error") == "" and page.js("state.steer") == [{"step": 3, "next": sorted([*both, late])}]


# ------------------------------------------------------------------------------------------------ a stored trace


def test_a_stored_trace_beside_a_checkpoint_is_not_changed_branched_or_shared(page, gallery, tmp_path):
    (tmp_path / "trace.npz").write_bytes(as_npz(*made(gallery)))
    panels = "['steer', 'branching', 'share'].map((id) => Boolean($(id).offsetParent))"
    with serving(gallery, json_events(events_of_trace(load_trace(tmp_path / "trace.npz")))) as other:
        page.open(f"http://127.0.0.1:{other.server_address[1]}/")
        done(page)
        assert "step 4 of 4" in text(page, "readout") and page.js(panels) == [False] * 3
        click(page, "generate")
        done(page, 2)
        assert page.js(panels) == [True] * 3
        click(page, "branch")
        done(page, 3)
        assert text(page, "error") == "" and page.js("$('branch-images').children.length") == 8


# --------------------------------------------------------------------------------------------- pointing, and keys

PLACE_OF = (
    "(name) => { const line = document.querySelector('#curves .' + name); return line && line.getAttribute('x1') }"
)


def test_a_token_chosen_by_key_marks_its_step_in_the_curves_whatever_step_is_shown(page):
    page.show()
    page.js("$('picture').focus()")
    page.press("ArrowRight")
    drawn = page.js("tokensOf(state.runs.a, 0).get(state.token).index")
    places = []
    for step in range(4):
        set_value(page, "scrubber", str(step), "input")
        now, mark = page.js(f"['now', 'mark'].map({PLACE_OF})")
        places.append(now)
        assert (now == mark) == (step == drawn)
    assert len(set(places)) == 4


def test_pointing_at_a_curve_marks_the_tokens_of_its_step(page):
    page.show()
    page.js("$('curves').scrollIntoView({block: 'center'})")
    blue = "(() => { const c = $('picture'), d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
    blue += " let n = 0; for (let i = 0; i < d.length; i += 4) n += d[i] === 31 && d[i + 2] === 255; return n })()"
    assert page.js(blue) == 0
    x, y, width, height = page.js(
        "(r => [r.x, r.y, r.width, r.height])($('curves').querySelector('svg').getBoundingClientRect())"
    )
    for share, step in ((34 / 240, 0), (0.97, 3)):
        page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x + share * width, y=y + height / 2)
        page.wait(f"state.hoverStep === {step}")
        marked = page.js("markedPositions(tokensOf(state.runs.a, 0)).sort((a, b) => a - b)")
        assert marked == page.js(f"state.runs.a.steps[{step}].images[0].positions") and page.js(blue) > 0
        assert page.js("document.querySelectorAll('#curves .mark').length > 3")
        assert "step 4 of 4" in text(page, "readout")
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=2, y=2)
    page.wait("state.hoverStep === null && !document.querySelector('#curves .mark')")


def test_keys_reach_the_tokens_of_every_scale(page):
    page.show(**VAR)
    reached = set()
    for step in range(3):
        set_value(page, "scrubber", str(step), "input")
        page.js("$('picture').focus()")
        for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp"):
            page.press(key)
            reached.add(page.js("state.token"))
            assert f"step{step + 1}" in text(page, "token")
    assert set(range(5)) < reached
    set_value(page, "scrubber", "0", "input")
    choose(page, "paint")
    page.js("selectToken(0), $('picture').focus()")
    page.press("Enter")
    assert page.js("state.painted.size") == 0  # a region is of cells of the finest
    page.press("ArrowRight")
    page.press("Enter")
    assert page.js("[...state.painted]") == [5]


def test_keys_play_and_scrub_where_the_focus_is_on_the_slider_or_the_picture(page):
    page.show()
    for place in ("scrubber", "picture"):
        page.js(f"$('{place}').focus()")
        for key, step in (("Home", 1), ("End", 4), ("Home", 1)):
            page.press(key)
            assert f"step {step} of 4" in text(page, "readout"), place
        page.press(" ", " ")
        assert text(page, "play") == "❚❚ pause", place
        page.press(" ", " ")
        assert text(page, "play") == "▶ play", place
    choose(page, "paint")
    page.js("$('picture').focus()")
    page.press("ArrowRight")
    page.press(" ", " ")  # paints
    assert page.js("[...state.painted]") == [0] and text(page, "play") == "▶ play"


def test_what_a_key_has_pressed_keeps_the_focus(page):
    page.show(labels=[1, 2], steer=[{"step": 1, "tau": 0.5}, {"step": 2, "tau": 0.6}])
    page.js("document.querySelectorAll('#strip button')[1].focus()")
    page.press("Enter", "\r")
    assert page.js("state.image === 1 && document.activeElement === $('strip').children[1]")
    for left in (1, 0):
        page.js("document.querySelector('#changes button').focus()")
        page.press("Enter", "\r")
        page.wait(f"!state.busy && state.steer.length === {left}")
        assert page.js("$('changes').contains(document.activeElement)")
