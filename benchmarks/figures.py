"""Writes the published figures into README and docs, from the committed results.

    python benchmarks/figures.py           # rewrite the regions
    python benchmarks/figures.py --check   # status 1 if a page is not up to date

A region begins with `<!-- figures: name -->` and ends with `<!-- /figures -->`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

import claims
from regions import (
    compiling,
    edits,
    lora,
    passes,
    realism,
    reference,
    schedules,
    serving,
    spark,
    steps,
)

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs" / "pages").glob("*/*.md")))

REGIONS: dict[str, Callable[[], str]] = {
    "summary": edits.summary,
    "lossy": edits.lossy,
    "edits": lambda: edits.edits_detail("edits.json"),
    "hits": lambda: edits.hits("edits.json"),
    "article": lambda: edits.edits_detail("article.json"),
    "article hits": lambda: edits.hits("article.json"),
    "every pass": passes.every_pass,
    "passes": lambda: edits.edits_detail("passes.json"),
    "lora": lora.lora_speed,
    "ladder": edits.ladder,
    "phases": edits.phases,
    "main job": edits.main_job,
    "steps": steps.steps,
    "flags": steps.flags,
    "operators": steps.operators,
    "profile": steps.profile,
    "profile fused": lambda: steps.profile("profile_fused.json"),
    "profile float8": lambda: steps.profile("profile_float8.json"),
    "around": steps.around,
    "freshness": steps.freshness,
    "cold": compiling.cold,
    "literal": compiling.literal,
    "symfloat": compiling.symfloat,
    "reference": lambda: reference.reference("reference.json", "edit 1024, 28 steps"),
    "reference again": lambda: reference.reference(
        "reference_again.json", "edit 1024, 28 steps", "edit 512, 20 steps"
    ),
    "reference on spark": reference.reference_on_spark,
    "frontier": reference.frontier,
    "predictors": schedules.predictors,
    "schedules": schedules.schedules,
    "spark": spark.spark,
    "realism": realism.realism,
    "vocabulary": spark.vocabulary,
    "passes on spark": spark.passes_on_spark,
    "eight bits": spark.eight_bits,
    "serving": serving.serving,
    "serve load": serving.load_test,
    "deployment": serving.deployment,
    "claims": claims.table,
}
"""What fills a region, by the region's name."""


def render(text: str) -> str:
    """Fill every region of a page."""

    def fill(match: re.Match[str]) -> str:
        try:
            body = REGIONS[match[1]]()
        except FileNotFoundError:
            body = "Not yet measured."
        return f"<!-- figures: {match[1]} -->\n{body}\n<!-- /figures -->"

    return re.sub(r"<!-- figures: (.+?) -->.*?<!-- /figures -->", fill, text, flags=re.DOTALL)


def main() -> int:
    """Rewrite the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    rendered = {page: render(page.read_text()) for page in PAGES}
    stale = {page: text for page, text in rendered.items() if text != page.read_text()}
    for page, text in stale.items():
        print(f"{'stale' if arguments.check else 'written'}: {page.relative_to(ROOT)}")
        if not arguments.check:
            page.write_text(text)
    return 1 if stale and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
