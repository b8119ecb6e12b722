"""The three views of the inspector's page show one state, in a real browser, Debian's Chromium."""

import numpy as np

from tests.helpers_browser import (
    FIXTURES,
    NEEDS_CHROMIUM,
    SETTINGS,
    click,
    done,
    images_of,
    set_value,
    shown,
    text,
)

pytestmark = NEEDS_CHROMIUM
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
