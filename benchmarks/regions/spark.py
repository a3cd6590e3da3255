"""Spark: how well it edits, and what passes do to its edits."""

from __future__ import annotations

from fluxfire.bench.tables import format_measure
from regions.results import load, markdown, where


def spark() -> str:
    """How well Spark edits, kind by kind, and what else its model card tells."""
    result = load("spark.json")
    splits = result["splits"]
    table = [
        (
            test["kind"],
            f"{test['n']}",
            f"{test['success']:.0%}",
            f"{train['success']:.0%}",
            f"{test['psnr']:.1f}",
            f"{test['gain']:+.1f}",
        )
        for test, train in zip(splits["test"], splits["train"], strict=True)
    ]
    head = (
        "kind", "edits", "done, held out", "done, as in training", "PSNR to the target, dB",
        "above the source, dB",
    )  # fmt: skip
    words = splits["from words"][-1]
    return (
        f"{markdown(head, table)}\n\n"
        f"From words alone, {words['success']:.0%} of {words['n']} pictures were right. The VAE "
        f"keeps {result['vae']['passed']:.1%} of the exact targets right, at "
        f"{result['vae']['psnr']:.1f} dB. Loading took {result['load_seconds']:.2f} s, an edit of "
        f"28 steps {result['edit_seconds']:.2f} s on {result['threads']} CPU cores; the file has "
        f"{result['bytes'] / 2**20:.1f} MiB.\n\n{where(result)}."
    )


def vocabulary() -> str:
    """What Spark's instructions are made of."""
    from fluxfire.spark.edits import KINDS, PLACES, WAYS
    from fluxfire.spark.scenes import COLOURS, GROUNDS, SHAPES

    lists = {
        "shapes": SHAPES, "colours": COLOURS, "grounds": GROUNDS, "places": PLACES, "ways": WAYS,
    }  # fmt: skip
    words = "\n".join(f"- **{name}**: {', '.join(of)}" for name, of in lists.items())
    rows = [
        (kind, *(f"“{_filled(wordings[0])}”" for wordings in (edit.known, edit.novel)))
        for kind, edit in KINDS.items()
    ]
    return f"{words}\n\n{markdown(('kind', 'a wording shown', 'one held out'), rows)}"


def _filled(wording: str) -> str:
    """Put examples for what a wording leaves open."""
    return wording.format(
        it="red circle", colour="blue", new="a green star", place="at the top", to="to the top",
        way="left", other="blue square", ground="navy",
    )  # fmt: skip


def passes_on_spark() -> str:
    """What the passes do to Spark's edits, and what fewer steps do."""
    result = load("passes_on_spark.json")
    table = [
        (
            row["stack"],
            f"{row['success']:.1%}",
            "same" if row["stack"] == "plain" else format_measure(row["psnr"]),
        )
        for row in result["rows"]
        if not row["error"]
    ]
    head = ("", "edits that succeed", "PSNR to plain, dB: mean [95%] (worst)")
    return (
        f"{markdown(head, table)}\n\n{result['examples']} held-out edits, {result['steps']} steps, "
        f"{result['dtype']}. {where(result)}."
    )
