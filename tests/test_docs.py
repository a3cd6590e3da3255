"""Every Python block of the documentation runs, in order, page by page.

FLUX.1 Kontext itself cannot be downloaded here: where a page loads it, it gets a miniature with
the same interface, which shrinks sizes and steps.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import FluxKontextPipeline
from PIL import Image
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

import fluxfire.spark.pipeline  # noqa: F401 - derives from the real class, so before it is replaced
from fluxfire.planning import registry
from fluxfire.testing import check_pass, tiny_kontext
from fluxfire_skip_tail import SkipTail

ROOT = Path(__file__).parent.parent
MANUAL = ROOT / "docs" / "pages"
PAGES = sorted([ROOT / "README.md", *MANUAL.glob("**/*.md")])
LINKING = [*PAGES, ROOT / "CHANGELOG.md"]
SYBIL = Sybil(parsers=[PythonCodeBlockParser()], patterns=["*.md"])


class Miniature(FluxKontextPipeline):
    """A tiny pipeline that takes a real one's arguments."""

    def __call__(self, *args, **call):
        for side in ("width", "height"):
            call[side] = call.get(side, 512) // 16
        call |= {
            "max_area": call["width"] * call["height"],
            "num_inference_steps": 2,
            "max_sequence_length": 24,
            "_auto_resize": False,
        }
        if call.get("image") is not None:
            call["image"] = call["image"].resize((32, 32))
        return super().__call__(*args, **call)

    def to(self, *args, **kwargs):
        return self

    @classmethod
    def from_pretrained(cls, name, **_):
        assert name == "black-forest-labs/FLUX.1-Kontext-dev"
        pipe = cls(**tiny_kontext().components)
        pipe.set_progress_bar_config(disable=True)
        return pipe


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_code_blocks_run(page, monkeypatch, tmp_path):
    monkeypatch.setattr("diffusers.FluxKontextPipeline", Miniature)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (80, 60), "navy").save("photo.jpg")
    for example in SYBIL.parse(page).examples():
        example.evaluate()


def test_the_pass_that_the_documentation_writes_is_the_one_whose_types_are_checked():
    page = (MANUAL / "how-to" / "write-a-pass.md").read_text()
    code = (ROOT / "tests" / "plugin" / "fluxfire_skip_tail.py").read_text()
    assert f"```python\n{code}```" in page


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"blocks": 2, "from_fraction": 0.0}])
def test_the_pass_that_the_documentation_writes_keeps_its_promises(settings):
    check_pass(SkipTail(**settings))


def test_some_pages_have_code():
    blocks = sum(page.read_text().count("```python") for page in PAGES)
    assert blocks >= 15


def test_figures_are_those_of_the_committed_results():
    command = [sys.executable, str(ROOT / "benchmarks" / "figures.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


MEASURED = [
    cls
    for cls in registry.built_in().values()
    if not cls.__module__.startswith("fluxfire.passes.contrib.")
]


@pytest.mark.parametrize("cls", MEASURED, ids=lambda cls: cls.name)
def test_docstrings_of_passes_say_what_the_table_of_passes_says(cls):
    lines = (MANUAL / "reference" / "passes.md").read_text().splitlines()
    row = " ".join(line for line in lines if line.startswith("|") and f"`{cls.__name__}" in line)
    paragraphs = [" ".join(part.split()) for part in cls.__doc__.split("\n\n")]
    (text,) = [part for part in paragraphs if 'Measured on an H100 (docs, "Passes")' in part]
    said = re.findall(r"[\d.]+ → [\d.]+|a hit \d+ ms|reuses \d+ ms", text)
    assert said
    assert [figure for figure in said if figure not in row] == []


@pytest.mark.parametrize("page", LINKING, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """In README too, and out of the pages, where mkdocs does not look; pages of the web apart."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if "://" in link:
            continue
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            broken.append(link)
    assert broken == []


def _prose(page):
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def _anchors(page):
    """What a page's headings are called in links."""
    headings = re.findall(r"^#+ (.+)$", _prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("package", ["", ".bench", ".passes", ".serve", ".spark", ".testing"])
def test_every_public_name_is_documented_in_the_reference(package):
    pytest.importorskip("fastapi")  # of fluxfire.serve
    text = "\n".join(page.read_text() for page in (MANUAL / "reference").glob("*.md"))
    told = [pkgutil.resolve_name(path) for path in re.findall(r"^::: (\S+)$", text, re.MULTILINE)]
    for module in filter(inspect.ismodule, list(told)):
        told += [getattr(module, name) for name in getattr(module, "__all__", dir(module))]
    module = importlib.import_module(f"fluxfire{package}")
    public = {name: getattr(module, name) for name in module.__all__}
    assert [name for name, value in public.items() if not any(value is one for one in told)] == []
    assert [name for name, value in public.items() if not value.__doc__] == []
