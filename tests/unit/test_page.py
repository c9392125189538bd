"""Pages of pictures: what they print besides."""

import logging

from dinoscope.visualize.page import Page


def test_weights_that_a_fallback_font_lacks_are_not_told_but_missing_fonts_are(caplog):
    for _ in range(2):
        Page(60, 40).text(5, 20, "title", 10, 50, weight="bold")
    fonts = logging.getLogger("matplotlib.font_manager")
    fonts.warning("findfont: Failed to find font weight %s for %s, now using %s.", "bold", "Droid Sans Fallback", 400)
    fonts.warning("findfont: Font family %r not found.", "Nowhere")
    assert [record.getMessage() for record in caplog.records] == ["findfont: Font family 'Nowhere' not found."]
