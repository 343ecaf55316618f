"""The report as a browser shows it."""

import os
from pathlib import Path

import pytest
from devtools import browser_tab, find_browser
from reporting_runs import RunBuilder, make_report


@pytest.mark.browser
def test_every_image_loads_and_nothing_else_is_asked_for(finished: RunBuilder, tmp_path: Path) -> None:
    executable = find_browser()
    if executable is None:
        if os.environ.get("MUCS_REQUIRE_BROWSER") == "1":
            pytest.fail("MUCS_REQUIRE_BROWSER=1, and no Chromium or Chrome is on the PATH")
        pytest.skip("no Chromium or Chrome on the PATH")
    finished.variant("mucs__forget_weight-0.5", finished.score * 2, forget_weight=0.5)
    page = make_report(finished.run, k=5)
    with browser_tab(executable, tmp_path / "profile") as tab:
        tab.open(page.as_uri())
        images = tab.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.naturalHeight, i.alt])")
        assert len(images) == 3 * (1 + 2 * 5)
        assert all(image[:3] == [True, 8, 8] and image[3] for image in images), images
        shown = tab.evaluate("[...document.images].map(i => [i.clientWidth, i.clientHeight])")
        assert all(width >= 60 and abs(width - height) <= 2 for width, height in shown), shown
        assert "Query 0" in tab.evaluate("document.querySelector('#query-0').innerText")
        assert "What it does not prove" in tab.evaluate("document.body.innerText")
        # the style sheet counts only where the content security policy accepts it
        assert tab.evaluate("getComputedStyle(document.querySelector('article.query')).display") == "grid"
        assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        asked = [e["params"]["request"]["url"] for e in tab.events if e["method"] == "Network.requestWillBeSent"]
        assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
        assert [e for e in tab.events if e["method"] == "Log.entryAdded"] == []
