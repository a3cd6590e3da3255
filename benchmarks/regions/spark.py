"""Spark: how well it edits, and what passes do to its edits."""

from __future__ import annotations

from collections.abc import Sequence

from fluxfire.bench.trials import names
from regions.results import Row, load, markdown, where


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


def passes_on_spark(name: str = "passes_on_spark.json") -> str:
    """What the passes do to Spark's edits."""
    result = load(name)
    table = [
        (
            row["stack"],
            f"{row['success']:.1%}",
            *(
                "same" if row["stack"] == "plain" else cell
                for cell in (
                    f"{row['psnr']['mean']:.1f} ({row['psnr']['worst']:.1f})",
                    f"{row['ssim']['mean']:.4f} ({row['ssim']['worst']:.4f})",
                    f"{row['flip']['mean']:.4f} ({row['flip']['worst']:.4f})",
                )
            ),
        )
        for row in result["rows"]
        if not row["error"]
    ]
    head = ("", "edits done", "PSNR to plain, dB: mean (worst)", "SSIM", "FLIP")
    return (
        f"{markdown(head, table)}\n\n{result['examples']} held-out edits, {result['steps']} steps, "
        f"{result['dtype']}. {where(result)}."
    )


def caches(*, steps: int | None = None, distance: str | None = None) -> str:
    """What FirstBlockCache hits on Spark's held-out edits, and what that costs."""
    result = load("caches.json")
    names = ("steps", "threshold", "distance", "predict")
    rows = [row for row in result["rows"] if row["kind"] == "edit"]
    rows = [row for row in rows if steps in (None, row["steps"])]
    rows = [row for row in rows if row["distance"] is None or distance in (None, row["distance"])]
    measures = [name for name in ("ssim_to_plain", "flip_to_plain") if name in rows[0]]
    table = [
        (
            *("none" if row[name] is None else f"{row[name]}" for name in names),
            f"{row['hits']:.0%}",
            "same"
            if row["threshold"] is None
            else f"{row['psnr_to_plain']['mean']:.1f} ({row['psnr_to_plain']['min']:.1f})",
            *(_worse(row.get(name)) for name in measures),
            f"{row['success']:.1%}",
        )
        for row in rows
    ]
    head = (
        *names, "hits", "PSNR to the plain result, dB: mean (minimum)",
        *(f"{name[:4].upper()}: mean (worst)" for name in measures), "edits done",
    )  # fmt: skip
    return f"{markdown(head, table)}\n\n{result['examples']} edits. {where(result)}."


def caches_brief() -> str:
    """The default distance, at the default number of steps."""
    return caches(steps=28, distance="all")


def _worse(told: Row | None) -> str:
    return f"{told['mean']:.4f} ({told['worst']:.4f})" if told else "-"


def tuned() -> str:
    """The budgets of the presets that `tune` set, and what it saw."""
    table = []
    for name in ("balanced", "fast"):
        result = load(f"tuned_{name}.json")
        found, budget = result["tuned"], result["tuned"]["budget"]
        checked, plainly = found["confirmed"], found["plain"]
        caches = [p for p in checked["passes"] if "Cache" in p]
        table.append(
            (
                name,
                _budget(budget),
                f"`{_own(caches)}`",
                f"{checked['psnr']['mean']:.1f} ({checked['psnr']['worst']:.1f})",
                f"{checked['ssim']['mean']:.4f} ({checked['ssim']['worst']:.4f})",
                f"{checked['flip']['mean']:.3f} ({checked['flip']['worst']:.3f})",
                f"{checked['success']:.1%} ({plainly['success']:.1%})",
                f"{checked['n']}",
                f"{found['attempts']}",
            )
        )
    head = (
        "preset", "budget", "its cache", "PSNR, dB: mean (worst)", "SSIM", "FLIP",
        "right (plain)", "edits held out", "lists tried on these",
    )  # fmt: skip
    prices = {kind: f"{seconds * 1e3:.0f} ms" for kind, seconds in found["prices"].items()}
    return (
        f"{markdown(head, table)}\n\nSpark, 28 steps. Speed over `faithful`, at what FLUX's "
        f"steps take on an H100: {prices['computed']} computed, {prices['reused']} reusing the "
        f"reference, {prices['hit']} for a hit, and {prices['around']} around. {where(result)}."
    )


def worst_cases() -> str:
    """What the plotted frontier shows, and how much worse the worst of more edits was."""
    confirmed = {
        name: load(f"tuned_{name}.json")["tuned"]["confirmed"] for name in ("balanced", "fast")
    }
    worst = " and ".join(
        f"{row['psnr']['worst']:.1f} dB with `{name}`" for name, row in confirmed.items()
    )
    (n,) = {row["n"] for row in confirmed.values()}
    return (
        f"Quality against speed, beside other caches, on {load('frontier.json')['examples']} edits "
        "by Spark at the prices of FLUX's steps on an H100 "
        "([the numbers](docs/pages/explanation/figures.md)).\n"
        f"Of the {n} edits that confirmed the presets the worst came to {worst} "
        "([the table](docs/pages/how-to/choose-passes.md))."
    )


def _budget(asked: dict[str, float | None]) -> str:
    """Say a preset's budget."""
    said = {"min_psnr": "worst PSNR {:g} dB", "mean_psnr": "mean PSNR {:g} dB"}
    parts = [text.format(asked[name]) for name, text in said.items() if asked.get(name)]
    return ", ".join([*parts, f"{asked['max_lost']:.0%} fewer right"])


def _own(reprs: Sequence[str]) -> str:
    """Leave the settings out that are the defaults."""
    from fluxfire import passes

    made = [eval(one, vars(passes)) for one in reprs]  # noqa: S307 - our own, from our own file
    return names(made)
