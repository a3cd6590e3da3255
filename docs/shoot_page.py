"""Takes the screenshots of the service's page: `python docs/shoot_page.py`.

It needs Chromium and Playwright, and runs `fluxfire serve` with Spark.
"""

from __future__ import annotations

import io
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from playwright.sync_api import Browser, expect, sync_playwright

ASSETS = Path(__file__).parent / "pages" / "assets"
SHOTS: dict[str, dict[str, Any]] = {
    "serve-page.webp": {"viewport": {"width": 1280, "height": 860}, "color_scheme": "light"},
    "serve-page-dark.webp": {"viewport": {"width": 1280, "height": 860}, "color_scheme": "dark"},
    "serve-page-phone.webp": {"viewport": {"width": 390, "height": 844}, "color_scheme": "light"},
}
"""Options of the browser for each picture."""
_PATIENCE = 600


def main() -> None:
    """Take each screenshot of an example that was edited."""
    browser_path = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    with service() as url, sync_playwright() as playwright:
        expect.set_options(timeout=_PATIENCE * 1000)
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        for name, options in SHOTS.items():
            picture = shoot(browser, url, options)
            picture.save(ASSETS / name, quality=80, method=6)
        browser.close()


def shoot(browser: Browser, url: str, options: dict[str, Any]) -> Image.Image:
    """Edit the first example, and return what is seen then."""
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(_PATIENCE * 1000)
    page.goto(url)
    expect(page.locator("#about")).to_contain_text("ready")
    page.locator("#examples button").first.click()
    expect(page.locator("#example-note")).to_be_visible()
    page.press("#prompt", "Control+Enter")
    expect(page.locator("#timings")).to_be_visible()
    page.evaluate("slider.value = 45; slider.dispatchEvent(new Event('input'))")
    page.evaluate("document.activeElement.blur()")
    if page.evaluate("innerWidth < 600"):
        page.locator("#stage").scroll_into_view_if_needed()
        page.evaluate("stage.scrollIntoView()")
    else:
        page.evaluate("scrollTo(0, 0)")
    seen = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    page.context.close()
    return seen


@contextmanager
def service() -> Iterator[str]:
    """Run the service, ready; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "fluxfire", "serve", "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)  # noqa: S603
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(_PATIENCE):
            with suppress(httpx.TransportError):
                if httpx.get(f"{url}/ready").status_code == httpx.codes.OK:
                    break
            time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


if __name__ == "__main__":
    main()
