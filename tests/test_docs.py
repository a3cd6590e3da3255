"""Every Python block of the documentation runs, in order, page by page.

FLUX.1 Kontext itself cannot be downloaded here: where a page loads it, it gets a miniature with
the same interface, which shrinks sizes and steps.
"""

from __future__ import annotations

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
from fluxfire import plugins
from fluxfire.testing import tiny_kontext

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/pages/**/*.md")])
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


def test_some_pages_have_code():
    blocks = sum(page.read_text().count("```python") for page in PAGES)
    assert blocks >= 15


def test_figures_are_those_of_the_committed_results():
    command = [sys.executable, str(ROOT / "benchmarks" / "figures.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", plugins.own())
def test_docstrings_of_passes_say_what_the_table_of_passes_says(name):
    cls = plugins.own()[name]
    lines = (ROOT / "docs" / "pages" / "reference" / "passes.md").read_text().splitlines()
    row = " ".join(line for line in lines if line.startswith("|") and f"`{cls.__name__}" in line)
    paragraphs = [" ".join(part.split()) for part in cls.__doc__.split("\n\n")]
    (text,) = [part for part in paragraphs if 'Measured on an H100 (docs, "Passes")' in part]
    said = re.findall(r"[\d.]+ → [\d.]+|a hit \d+ ms|reuses \d+ ms", text)
    assert said
    assert [figure for figure in said if figure not in row] == []
