"""The page at `/`, in headless Chromium, with the service behind it."""

from __future__ import annotations

import base64
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")
uvicorn = pytest.importorskip("uvicorn")
sync_api = pytest.importorskip("playwright.sync_api")

from diffusers.pipelines.flux.pipeline_flux_kontext import (  # noqa: E402
    PREFERRED_KONTEXT_RESOLUTIONS,
)

from fluxfire import serve  # noqa: E402
from fluxfire.bench import held_out  # noqa: E402
from fluxfire.serve import Settings, create_app  # noqa: E402
from fluxfire.serve.errors import RefusedError  # noqa: E402
from fluxfire.serve.keys import new_key  # noqa: E402
from fluxfire.serve.schema import EditRequest  # noqa: E402

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium (apt install chromium)")
PATIENCE = 600
"""Seconds for what takes a few, on a busy machine; only what never comes needs so many."""
START = 1800
"""The same for a service's start, which imports and loads a lot."""

PAGE = Path(serve.__file__).parent / "page"
FIELD = re.compile(r"--form-string '(\w+)=([^']*)'")
"""A field of a request in the page's command for curl."""


class Running:
    """A service in a thread of this process."""

    def __init__(self, **settings):
        # Neither a slow edit nor a worker that a test holds is to be given up.
        patient = {"request_seconds": START, "hang_seconds": START}
        self.app = create_app(Settings(**patient, **settings))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        config = uvicorn.Config(self.app, port=port, log_level="warning")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self):
        self._thread.start()
        ends = time.monotonic() + START
        while not self._server.started or self.app.state.engine.state == "starting":
            assert self._thread.is_alive()
            assert time.monotonic() < ends, "the service does not start"
            time.sleep(0.1)
        assert self.app.state.engine.state == "ready", self.app.state.engine.trouble
        return self

    def __exit__(self, *_):
        self._server.should_exit = True
        self._thread.join(PATIENCE)

    @property
    def worker_pid(self):
        return self.app.state.engine._supervisor._worker._process.pid


@pytest.fixture(scope="module")
def service():
    with Running(max_bytes=200_000) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    sync_api.expect.set_options(timeout=PATIENCE * 1000)
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"], timeout=PATIENCE * 1000
        )
        yield started
        started.close()


@pytest.fixture
def page(browser, service):
    yield from opened(browser, service.url)


def new_tab(browser, **options):
    tab = browser.new_context(**options).new_page()
    tab.set_default_timeout(PATIENCE * 1000)
    return tab


def opened(browser, url, **options):
    tab = new_tab(browser, **options)
    said = []
    tab.on(
        "console", lambda message: said.append(message.text) if message.type == "error" else None
    )
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.goto(url)
    sync_api.expect(tab.locator("#about")).to_contain_text("ready")
    yield tab
    # A refused or broken request is told by Chromium, too, whatever the page makes of it.
    assert [line for line in said if not line.startswith("Failed to load resource")] == []
    tab.context.close()


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "scene.png"
    held_out(1)[0].picture.save(path)
    return path


def fill(page, photo, prompt="make the background purple", steps="4"):
    page.set_input_files("#file", photo)
    sync_api.expect(page.locator("#chosen")).to_be_visible()
    page.fill("#prompt", prompt)
    page.fill("#steps", steps)


def width(picture):
    """Its pixels in a row, once it is there: to name one is not yet to have it."""
    return picture.evaluate("image => image.decode().then(() => image.naturalWidth)")


def test_an_edit_from_picture_to_comparison(page, photo):
    expect = sync_api.expect
    fill(page, photo, steps="8")
    page.get_by_text("fast", exact=True).click()
    page.fill("#seed", "7")
    page.press("#prompt", "Control+Enter")
    expect(page.locator("#outcome")).to_be_visible()
    assert width(page.locator("#after")) == 128
    assert page.locator("#before").is_visible()
    assert page.locator("#made-words").inner_text() == "make the background purple"
    assert page.locator("#made-seed").inner_text() == "7"
    cells = page.locator("#strip i").evaluate_all("cells => cells.map(c => c.className)")
    assert len(cells) == 8
    assert cells[0] == "computed"
    assert "hit" in cells
    said = page.locator("#saved").inner_text()
    assert f"{cells.count('hit')} of 8 steps ran only the first block" in said
    assert "Quality: fast" in said
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename.endswith(".png")
    assert Image.open(download.value.path()).size == (128, 128)
    assert page.locator("#progress").is_hidden()


def test_each_quality_says_what_it_does_and_faithful_is_chosen(page, photo, service):
    levels = service.app.state.engine.facts.levels
    assert list(levels) == ["faithful", "balanced", "fast"]
    for name, does in levels.items():
        radio = page.get_by_role("radio", name=f"{name} {does}")
        assert radio.is_checked() == (name == "faithful")
    fill(page, photo, steps="8")
    page.click("#edit")
    sync_api.expect(page.locator("#saved")).to_have_text(
        "All 8 steps were computed in full. Quality: faithful."
    )


def test_the_slider_moves_what_is_seen(page, photo):
    fill(page, photo, steps="1")
    page.click("#edit")
    sync_api.expect(page.locator("#slider")).to_be_visible()
    for name in ("#before", "#after"):
        assert width(page.locator(name)) == 128

    def clipped():
        return page.locator("#before").evaluate("image => getComputedStyle(image).clipPath")

    start = clipped()
    assert page.locator("#slider").input_value() == "12"  # nearly all of the result is seen
    assert page.locator(".line svg").is_visible()
    page.focus("#slider")
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    assert page.locator("#slider").input_value() == "22"
    moved = clipped()
    assert moved != start
    page.focus("#hold")
    page.keyboard.down("Space")
    assert clipped() == "none"
    page.keyboard.up("Space")
    assert clipped() == moved
    page.hover("#hold")
    page.mouse.down()
    assert clipped() == "none"
    page.mouse.move(0, 0)
    page.mouse.up()
    assert clipped() == moved
    pair = page.locator("#pair").bounding_box()
    page.mouse.click(pair["x"] + pair["width"] * 0.1, pair["y"] + pair["height"] / 2)
    assert int(page.locator("#slider").input_value()) < 20


def test_several_pictures_and_editing_further(page, photo):
    fill(page, photo, steps="1")
    page.click("#more summary")
    page.fill("#num_images", "2")
    page.fill("#seed", "3")
    page.click("#edit")
    thumbs = page.locator("#thumbs button")
    sync_api.expect(thumbs).to_have_count(2)
    thumbs.nth(1).click()
    assert page.locator("#made-seed").inner_text() == "4"
    second = page.locator("#after").get_attribute("src")
    chosen = page.locator("#chosen").get_attribute("src")
    page.click("#further")
    page.wait_for_function("old => document.querySelector('#chosen').src !== old", arg=chosen)
    page.fill("#num_images", "1")
    page.click("#edit")
    sync_api.expect(thumbs).to_have_count(1)
    sync_api.expect(page.locator("#thumbs")).to_be_hidden()
    assert page.locator("#after").get_attribute("src") != second


def test_before_and_after_lie_over_each_other(page, tmp_path):
    landscape = tmp_path / "landscape.png"
    Image.effect_noise((200, 110), 60).save(landscape)  # of no shape that Spark makes exactly
    fill(page, landscape, steps="1")
    page.click("#edit")
    sync_api.expect(page.locator("#outcome")).to_be_visible()
    assert width(page.locator("#before")) == 200
    assert width(page.locator("#after")) > 0
    before, after = (page.locator(name).bounding_box() for name in ("#before", "#after"))
    assert before == after
    wide, high = page.locator("#after").evaluate("i => [i.naturalWidth, i.naturalHeight]")
    assert after["width"] / after["height"] == pytest.approx(wide / high, rel=0.01)
    for name in ("#before", "#after"):
        fitted = page.locator(name).evaluate("image => getComputedStyle(image).objectFit")
        assert fitted == "fill"


def test_another_shape_is_not_stretched(page, photo):
    fill(page, photo, steps="1")
    page.get_by_text("16:9", exact=True).click()
    page.click("#edit")
    sync_api.expect(page.locator("#outcome")).to_be_visible()
    assert "176 × 96 pixels" in page.locator("#timings").inner_text()
    fitted = page.locator("#before").evaluate("image => getComputedStyle(image).objectFit")
    assert fitted == "contain"


def test_each_shape_is_a_size_that_kontext_prefers(page):
    for choice in page.locator("#shapes label").all():
        choice.click()
        sent = dict(FIELD.findall(page.locator("#curl").text_content()))
        size = {name: int(sent[name]) for name in ("width", "height") if name in sent}
        assert bool(size) == (choice.inner_text() != "as it is")
        EditRequest(prompt="x", **size)
        if size:
            assert (size["width"], size["height"]) in PREFERRED_KONTEXT_RESOLUTIONS
            wide, high = map(int, choice.inner_text().split(":"))
            assert size["width"] / size["height"] == pytest.approx(wide / high, rel=0.05)


def test_spark_offers_a_scene_of_the_kind_it_knows(page, service):
    assert "It edits pictures of emoji" in page.locator("#spark-note").inner_text()
    assert (
        page.locator("#prompt").get_attribute("placeholder") == "replace the cactus with a castle"
    )
    page.click("#scene")
    sync_api.expect(page.locator("#chosen")).to_be_visible()
    assert width(page.locator("#chosen")) == 128
    assert page.locator("#prompt").input_value() == "replace the cactus with a castle"


def test_examples_show_what_spark_makes_of_them(page, service):
    """A click shows an example's pictures; sent, it gives the shipped picture again."""
    cards = page.locator("#examples button")
    sync_api.expect(cards).to_have_count(4)
    shipped = [file for file in PAGE.iterdir() if file.suffix == ".webp"]
    assert sum(file.stat().st_size for file in shipped) < 200_000
    assert len(shipped) == 8
    for card in cards.all():
        words = card.inner_text()
        card.click()
        sync_api.expect(page.locator("#made-words")).to_have_text(words)
        assert page.locator("#prompt").input_value() == words
        assert page.locator("#seed").input_value() == page.locator("#made-seed").inner_text() == "7"
        for name in ("#before", "#after", "#chosen"):
            assert width(page.locator(name)) == 128
        assert page.locator("#example-note").is_visible()
        assert page.locator("#timings").is_hidden()
    assert page.locator("#history").is_hidden()  # this browser made nothing
    page.fill("#steps", "28")
    page.press("#prompt", "Control+Enter")
    sync_api.expect(page.locator("#timings")).to_be_visible()
    with page.expect_download() as download:
        page.click("#download")
    made = pixels(download.value.path())
    assert abs(made - pixels(PAGE / "boat-after.webp")).mean() < 4  # WebP loses a little
    assert abs(made - pixels(PAGE / "boat-before.webp")).mean() > 6
    sync_api.expect(page.locator("#kept button")).to_have_count(1)


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"), np.int16)


def test_what_the_service_warns_of_is_shown_and_kept(page, photo):
    fill(page, photo, prompt="a red circle " * 60, steps="1")
    page.click("#edit")
    warnings = page.locator("#warnings")
    sync_api.expect(warnings).to_contain_text("CLIP reads the first 77 of them")
    sync_api.expect(page.locator("#edit")).to_be_enabled()
    page.reload()
    page.locator("#kept button").first.click()
    sync_api.expect(warnings).to_contain_text("CLIP reads the first 77 of them")
    page.locator("#examples button").first.click()
    sync_api.expect(page.locator("#example-note")).to_be_visible()
    assert warnings.is_hidden()


def test_a_picture_of_another_kind_is_converted(page, tmp_path):
    drawn = Image.new("RGB", (64, 48), (200, 30, 40))
    drawn.save(tmp_path / "a.bmp")  # the service would refuse it
    fill(page, tmp_path / "a.bmp", steps="1")
    assert 'image=@"a.png"' in page.locator("#curl").text_content()
    page.click("#edit")
    sync_api.expect(page.locator("#outcome")).to_be_visible()
    assert width(page.locator("#before")) == 64


def test_pasted_it_is_the_picture_to_edit(page, photo):
    file = base64.b64encode(photo.read_bytes()).decode()
    page.evaluate(
        """file => {
          const bytes = Uint8Array.from(atob(file), (char) => char.charCodeAt(0));
          const data = new DataTransfer();
          data.items.add(new File([bytes], "pasted.png", { type: "image/png" }));
          document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data }));
        }""",
        file,
    )
    sync_api.expect(page.locator("#chosen")).to_be_visible()
    assert width(page.locator("#chosen")) == 128


def test_all_of_it_can_be_done_by_keyboard(page):
    """From the top by Tab alone: an example, its edit, both pictures, the whole screen."""

    def go_to(name):
        for _ in range(80):
            page.keyboard.press("Tab")
            here = page.evaluate("document.activeElement.closest('[id]')?.id")
            if here == name:
                ring = page.evaluate(
                    """() => {
                      const at = document.activeElement;
                      const seen = at.type === "range" ? at.parentElement : at;
                      return getComputedStyle(seen).outlineStyle;
                    }"""
                )
                assert ring == "solid", name
                return
        raise AssertionError(f"Tab does not reach {name}")

    go_to("examples")
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#example-note")).to_be_visible()
    page.evaluate("document.activeElement.blur()")
    go_to("prompt")
    page.fill("#steps", "1")
    page.keyboard.press("Control+Enter")
    sync_api.expect(page.locator("#timings")).to_be_visible()
    go_to("slider")
    page.keyboard.press("ArrowRight")
    assert page.locator("#slider").input_value() == "13"
    go_to("hold")
    page.keyboard.down("Space")
    assert page.locator("#pair.held").count() == 1
    page.keyboard.up("Space")
    assert page.locator("#pair.held").count() == 0
    go_to("full")
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#zoom")).to_be_visible()
    page.keyboard.press("Escape")
    sync_api.expect(page.locator("#zoom")).to_be_hidden()


CONTRAST = """() => {
  const read = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const part = (c) => ((c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  };
  const ground = (at) => {
    for (; at; at = at.parentElement) {
      const [r, g, b, a = 1] = read(getComputedStyle(at).backgroundColor);
      if (a > 0.6) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const at of document.querySelectorAll("body *")) {
    const own = [...at.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !at.checkVisibility() || at.disabled || at.closest(".waiting")) continue;
    const pair = [light(read(getComputedStyle(at).color)), light(ground(at))];
    const contrast = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    if (contrast < 4.5) found.push([at.outerHTML.slice(0, 80), contrast]);
  }
  return found;
}"""
"""Texts that stand out too little from what is behind them (WCAG AA)."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_can_be_read_in_light_and_in_dark(browser, service, scheme):
    for tab in opened(browser, service.url, color_scheme=scheme, reduced_motion="reduce"):
        tab.locator("#examples button").first.click()
        sync_api.expect(tab.locator("#example-note")).to_be_visible()
        tab.click("#more summary")
        tab.click("#as-code summary")
        tab.fill("#prompt", "")
        tab.click("#edit")
        sync_api.expect(tab.locator("#problem")).to_be_visible()
        ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground))) < 150) == (scheme == "dark")
        assert tab.evaluate(CONTRAST) == []


def test_the_interface_is_described_without_the_internet(browser, service):
    tab = new_tab(browser)
    asked = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(f"{service.url}/docs")
    sync_api.expect(tab.get_by_text("Edit a picture, and wait for the result")).to_be_visible()
    assert [url for url in asked if not url.startswith((service.url, "data:"))] == []
    tab.context.close()


def test_from_words_alone_and_away_from_others(page, photo):
    fill(page, photo, prompt="a red circle", steps="1")
    assert page.locator("#edit").inner_text() == "Edit"
    page.click("#remove")
    assert page.locator("#chosen").is_hidden()
    assert page.locator("#edit").inner_text() == "Draw"
    fill(page, photo, prompt="a red circle", steps="1")  # the same file again
    page.click("#remove")
    page.click("#more summary")
    strength = page.locator("#true_cfg_scale")
    assert strength.is_disabled()
    assert {"true_cfg_scale", "negative_prompt"}.isdisjoint(
        dict(FIELD.findall(page.locator("#curl").text_content()))
    )
    page.fill("#negative_prompt", "blue")
    assert strength.is_enabled()
    page.fill("#true_cfg_scale", "1")
    page.click("#edit")
    sync_api.expect(page.locator("#problem")).to_contain_text("True guidance:")
    page.fill("#true_cfg_scale", "2")
    page.click("#edit")
    sync_api.expect(page.locator("#outcome")).to_be_visible()
    assert page.locator("#before").is_hidden()
    assert page.locator("#slider").is_hidden()


def test_a_result_comes_back_after_a_reload(page, photo):
    expect, results = sync_api.expect, page.locator("#kept button")
    fill(page, photo, steps="1")
    page.fill("#seed", "5")
    page.click("#edit")
    expect(results).to_have_count(1)
    page.click("#remove")
    page.fill("#prompt", "a red circle")
    page.fill("#seed", "6")
    page.click("#edit")
    expect(results).to_have_count(2)
    expect(page.locator("#edit")).to_be_enabled()  # so the browser has stored it
    page.reload()
    expect(results).to_have_count(2)
    assert page.locator("#outcome").is_hidden()
    results.nth(1).click()
    assert page.locator("#made-seed").inner_text() == "5"
    assert page.locator("#made-words").inner_text() == "make the background purple"
    for name in ("#before", "#after"):
        assert width(page.locator(name)) == 128
    page.click("#full")
    assert width(page.locator("#zoomed")) == 128
    page.keyboard.press("Escape")
    expect(page.locator("#zoom")).to_be_hidden()
    page.click("#further")
    expect(page.locator("#chosen")).to_be_visible()
    page.on("dialog", lambda dialog: dialog.accept())
    page.click("#clear")
    expect(page.locator("#history")).to_be_hidden()
    assert width(page.locator("#after")) == 128
    page.reload()
    expect(page.locator("#about")).to_contain_text("ready")
    expect(results).to_have_count(0)


def test_the_history_is_bounded(page):
    """Older pictures leave the browser's store, too."""
    page.evaluate(
        """async () => {
          const blob = await (await fetch("page/castle-before.webp")).blob();
          const image = { blob, filename: "a.png", seed: 1, width: 128, height: 128 };
          const opening = indexedDB.open("fluxfire", 1);
          await new Promise((resolve) => (opening.onsuccess = resolve));
          const change = opening.result.transaction("results", "readwrite");
          for (let n = 0; n < 12; n++) {
            change.objectStore("results").add({ words: `${n}`, images: [image, image, image] });
          }
          await new Promise((resolve) => (change.oncomplete = resolve));
          opening.result.close();
        }"""
    )
    for _ in range(2):
        page.reload()
        sync_api.expect(page.locator("#kept button")).to_have_count(10)
    assert page.locator("#kept button").first.get_attribute("title") == "11"


class Elsewhere:
    """A store that no page may read, as most buckets are."""

    def __init__(self):
        self.kept = {}

    def put(self, name, data, kind):
        self.kept[name] = data

    def get(self, name):
        return self.kept[name]

    def url(self, name):
        return f"https://store.example/{name}"


def test_pictures_in_another_store_come_by_way_of_the_service(page, photo, service, monkeypatch):
    monkeypatch.setattr(service.app.state.service, "storage", store := Elsewhere())
    fill(page, photo, steps="1")
    page.click("#edit")
    sync_api.expect(page.locator("#outcome")).to_be_visible()
    assert width(page.locator("#after")) == 128
    with page.expect_download() as download:
        page.click("#download")
    assert {download.value.suggested_filename: download.value.path().read_bytes()} == store.kept
    sync_api.expect(page.locator("#kept button")).to_have_count(1)
    page.click("#further")
    sync_api.expect(page.locator("#chosen")).to_be_visible()
    assert page.locator("#unreadable").is_hidden()


def test_what_cannot_be_read_is_shown_by_its_link(page, photo, service, monkeypatch):
    monkeypatch.setattr(service.app.state.service, "storage", Elsewhere())
    page.route("https://store.example/**", lambda route: route.fulfill(path=photo))
    page.route("**/images/0", lambda route: route.abort())
    fill(page, photo, steps="1")
    page.click("#edit")
    sync_api.expect(page.locator("#outcome")).to_be_visible()
    assert width(page.locator("#after")) == 128
    download = page.locator("#download")
    assert download.get_attribute("href").startswith("https://store.example/")
    assert download.get_attribute("target") == "_blank"
    assert download.get_attribute("rel") == "noopener"
    assert page.locator("#further").is_disabled()
    assert "cannot read the picture" in page.locator("#unreadable").inner_text()
    sync_api.expect(page.locator("#edit")).to_be_enabled()
    assert page.locator("#history").is_hidden()  # the link expires


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_commands_for_curl_and_python_do_the_same(page, photo, tmp_path):
    words = """it's "@purple" $HOME; `x` \\ <a"""
    named = tmp_path / """a 'pic"ture".png"""
    shutil.copy(photo, named)
    fill(page, named, prompt=words, steps="1")
    page.fill("#seed", "9")
    command = page.locator("#curl").text_content()
    assert "KEY" not in command
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True, timeout=PATIENCE)
    answer = json.loads((tmp_path / "answer.json").read_text())
    page.click("#edit")
    sync_api.expect(page.locator("#outcome")).to_be_visible()
    with page.expect_download() as download:
        page.click("#download")
    made = answer["images"][0]["data_url"].partition(",")[2]
    assert base64.b64decode(made) == download.value.path().read_bytes()
    program, folder = page.locator("#python").text_content(), tmp_path / "python"
    folder.mkdir()
    shutil.copy(named, folder)
    subprocess.run([sys.executable, "-c", program], cwd=folder, check=True, timeout=PATIENCE)
    (file,) = set(folder.iterdir()) - {folder / named.name}
    assert file.read_bytes() == download.value.path().read_bytes()


def until(page, condition):
    """Wait for something that the page does not show; it goes on meanwhile."""
    ends = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < ends, f"not within {PATIENCE} s"
        page.wait_for_timeout(50)


def test_cancel(page, photo, service, held):
    fill(page, photo)
    with held(service.worker_pid):  # or the edit may be over before it is cancelled
        page.click("#edit")
        sync_api.expect(page.locator("#progress-text")).to_have_text("Step 0 of 4")
        sync_api.expect(page.locator("#clock")).to_have_text(re.compile(r"\d s$"))
        assert page.locator("#stage.waiting").count() == 1
        page.click("#cancel")
        sync_api.expect(page.locator("#problem")).to_have_text("Cancelled.")
        assert page.locator("#edit").is_enabled()
        assert page.locator("#stage.waiting").count() == 0


def test_what_is_waited_for_is_told_truly(page):
    """The model loads, the service goes away and comes back, and at last the steps are made."""
    job = {"id": "a", "status": "queued", "position": 0, "step": 0, "steps": 40}
    job |= {"result": None, "error": None}
    about = page.evaluate("fetch('about').then(answer => answer.json())")
    page.route("**/jobs", lambda route: route.fulfill(status=202, json=job))
    page.route("**/jobs/a/events", lambda route: route.abort())
    page.route("**/jobs/a", lambda route: route.fulfill(json=job))
    page.route("**/about", lambda route: route.fulfill(json=about))
    said = sync_api.expect(page.locator("#progress-text"))
    about["state"] = "starting"
    page.fill("#prompt", "x")
    page.click("#edit")
    said.to_have_text("The model is loading")
    sync_api.expect(page.locator("#about")).to_contain_text("the model is loading")
    about["state"] = "ready"
    said.to_have_text("Next in the queue")
    job["position"] = 2
    said.to_have_text("2 before this one")
    page.route("**/about", lambda route: route.abort())
    said.to_have_text("The service cannot be reached; the page tries again")
    page.unroute("**/about")
    page.route("**/about", lambda route: route.fulfill(json=about))
    job |= {"status": "running", "position": None, "step": 1}
    said.to_have_text("Step 1 of 40")
    job["step"] = 2
    sync_api.expect(page.locator("#clock")).to_contain_text("left")
    job |= {"status": "queued", "position": 0, "step": 0}
    about["state"] = "starting"
    said.to_have_text("The worker was replaced; the model is loading")
    about["state"] = "ready"
    job |= {"status": "failed", "error": {"code": "x", "message": "the GPU is gone"}}
    sync_api.expect(page.locator("#problem")).to_have_text("The GPU is gone.")


def test_cancelled_while_it_is_sent_nothing_runs_on(page, photo, service, held):
    def jobs():
        rows = service.app.state.jobs._store._run("SELECT id, status FROM jobs")
        return dict(map(tuple, rows))

    before, sent = set(jobs()), []
    page.route("**/jobs", lambda route: sent.append(route))  # noqa: PLW0108
    fill(page, photo)
    with held(service.worker_pid):  # or the edit may be over before it is cancelled
        page.click("#edit")
        until(page, lambda: sent)
        page.click("#cancel")
        sync_api.expect(page.locator("#problem")).to_have_text("Cancelled.")
        assert set(jobs()) == before
        sent[0].continue_()
        until(page, lambda: set(jobs()) - before)
        (name,) = set(jobs()) - before
        until(page, lambda: jobs()[name] not in {"queued", "running"})
    assert jobs()[name] == "cancelled"


def test_a_picture_chosen_meanwhile_leaves_the_comparison_as_it_was(
    page, photo, tmp_path, service, held
):
    other = tmp_path / "other.png"
    Image.new("RGB", (64, 64)).save(other)
    fill(page, photo, steps="8")
    with held(service.worker_pid):  # or the edit may be over before the other is chosen
        page.click("#edit")
        page.set_input_files("#file", other)
        page.wait_for_function("document.querySelector('#chosen').naturalWidth === 64")
    sync_api.expect(page.locator("#outcome")).to_be_visible()
    shown = page.locator("#before")
    sync_api.expect(shown).to_be_visible()
    assert width(shown) == 128
    assert width(page.locator("#chosen")) == 64


def test_a_full_queue_is_told_with_when_to_try_again(page, photo, service, monkeypatch):
    def full(*_):
        raise RefusedError(
            "8 requests wait already; try again later", status=429, code="queue-full"
        )

    monkeypatch.setattr(service.app.state.jobs, "begin", full)
    fill(page, photo)
    page.click("#edit")
    said = page.locator("#problem")
    sync_api.expect(said).to_contain_text("8 requests wait already")
    sync_api.expect(said).to_contain_text("Try again in")


def test_a_connection_that_breaks_is_made_up_for(page, photo):
    page.route("**/events", lambda route: route.abort())
    fill(page, photo, steps="1")
    page.click("#edit")
    sync_api.expect(page.locator("#outcome")).to_be_visible()


def test_what_is_wrong_is_told_before_anything_is_sent(page, tmp_path):
    page.click("#edit")
    sync_api.expect(page.locator("#problem")).to_have_text("Write an instruction first.")
    big = tmp_path / "big.png"
    big.write_bytes(bytes(300_000))
    page.set_input_files("#file", big)
    sync_api.expect(page.locator("#problem")).to_contain_text("the service takes 200000")
    wrong = tmp_path / "wrong.png"
    wrong.write_bytes(b"nothing")
    page.set_input_files("#file", wrong)
    sync_api.expect(page.locator("#problem")).to_contain_text("cannot be read as a picture")
    page.fill("#prompt", "x")
    page.fill("#steps", "99")
    page.click("#edit")
    sync_api.expect(page.locator("#problem")).to_contain_text("Steps:")


def test_words_of_others_are_no_markup(page, monkeypatch, service):
    def refuse(*_):
        raise RefusedError("<img src=x onerror=alert(1)>", status=422, code="x")

    monkeypatch.setattr(service.app.state.jobs, "begin", refuse)
    page.fill("#prompt", "x")
    page.click("#edit")
    sync_api.expect(page.locator("#problem")).to_have_text("<img src=x onerror=alert(1)>.")
    assert page.locator("#problem img").count() == 0


def test_on_a_phone_nothing_hangs_over(browser, service, photo):
    for tab in opened(browser, service.url, viewport={"width": 375, "height": 740}, has_touch=True):
        assert tab.locator("#edit").evaluate("b => b.getBoundingClientRect().bottom") <= 740
        fill(tab, photo, steps="1")
        tab.click("#more summary")
        tab.click("#as-code summary")
        tab.click("#edit")
        sync_api.expect(tab.locator("#outcome")).to_be_visible()
        assert width(tab.locator("#after")) > 0
        wide = tab.evaluate("document.documentElement.scrollWidth")
        assert wide <= 375


def test_a_key_is_asked_for_and_kept_for_the_session(browser, tmp_path):
    key, line = new_key("ann")
    file = tmp_path / "keys"
    file.write_text(line)
    with Running(keys_file=file, passes="none") as running:
        tab = new_tab(browser)
        tab.goto(running.url)
        sync_api.expect(tab.locator("#about")).to_have_text("This service needs a key.")
        assert tab.get_by_text("Quality").is_hidden()
        tab.fill("#prompt", "x")
        tab.click("#edit")
        sync_api.expect(tab.locator("#problem")).to_have_text("Enter the service's key first.")
        tab.fill("#key", "ff_wrong")
        tab.press("#key", "Tab")
        sync_api.expect(tab.locator("#problem")).to_have_text("This key is unknown.")
        tab.fill("#key", key)
        tab.press("#key", "Tab")
        sync_api.expect(tab.locator("#about")).to_contain_text("ready")
        assert tab.locator("#problem").is_hidden()
        command, program = (tab.locator(each).text_content() for each in ("#curl", "#python"))
        assert '-H "Authorization: Bearer $KEY"' in command
        assert """{"Authorization": f"Bearer {os.environ['KEY']}"}""" in program
        assert key not in command + program
        tab.reload()
        sync_api.expect(tab.locator("#about")).to_contain_text("ready")
        assert tab.evaluate("localStorage.length") == 0
        assert tab.locator("input[name=quality]").count() == 1
        assert tab.locator("#qualities").is_hidden()
        tab.context.close()
