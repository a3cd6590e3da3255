"""The documentation's site, built and looked at in a browser as wide as a phone."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PHONE = 390  # pixels

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no chromium"),
    pytest.mark.skipif(not importlib.util.find_spec("material"), reason="no mkdocs-material"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    options = ["--strict", "--quiet", "-f", str(ROOT / "docs" / "mkdocs.yml"), "-d", str(folder)]
    subprocess.run([sys.executable, "-m", "mkdocs", "build", *options], check=True)
    return folder


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


def test_no_page_scrolls_sideways_on_a_phone_or_asks_another_site(site, browser):
    page = browser.new_page(viewport={"width": PHONE, "height": 844})
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    too_wide = {}
    for file in sorted(site.rglob("*.html")):
        page.goto(file.as_uri())
        width = page.evaluate("document.documentElement.scrollWidth")
        if width > PHONE:
            too_wide[str(file.relative_to(site))] = width
    assert too_wide == {}
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


def test_the_reference_lists_its_objects_beside_the_page(site, browser):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto((site / "reference" / "functions.html").as_uri())
    listed = page.locator(".md-sidebar--secondary").inner_text()
    assert "optimize" in listed
    assert "warmup" in listed
