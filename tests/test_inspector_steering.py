"""What is seen and steered in the inspector's page, step by step, in a real browser; skipped where there is none."""

import numpy as np

from tests.helpers_browser import FIXTURES, NEEDS_CHROMIUM, click, done, images_of, set_value, shown, text
from tests.helpers_inspector import picture

pytestmark = NEEDS_CHROMIUM
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
