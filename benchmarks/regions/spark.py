"""Spark: how well it edits, and what passes do to its edits."""

from __future__ import annotations

from fluxfire.bench.intervals import share_interval
from fluxfire.bench.tables import format_measure
from fluxfire.text import count_of
from regions.results import Row, load, markdown, where


def spark() -> str:
    """How well Spark edits, kind by kind, and what else its model card tells."""
    result = load("spark.json")
    splits, cpu = result["splits"], result["cpu"]
    table = [
        (
            test["kind"],
            f"{test['n']}",
            *(_share(split) for split in (test, train)),
        )
        for test, train in zip(splits["test"], splits["train"], strict=True)
    ]
    head = ("kind", "edits", "done, held out [95%]", "done, as in training [95%]")
    words = splits["from words"][-1]
    fewer = ", ".join(
        f"{share:.0%} with {count_of(int(steps), 'step')}"
        for steps, share in result["fewer"].items()
    )
    return (
        f"{markdown(head, table)}\n\n"
        f"With fewer steps it gets right, of {result['fewer_edits']} held-out edits: {fewer}. "
        f"From words alone, {words['success']:.0%} of {words['n']} pictures were right. The VAE "
        f"keeps {result['vae']['passed']:.0%} of the valid results right, at "
        f"{result['vae']['psnr']:.1f} dB. Loading took {cpu['load_seconds']:.1f} s, an edit of "
        f"28 steps {cpu['edit_seconds']:.1f} s on {cpu['threads']} CPU cores; the file has "
        f"{result['bytes'] / 2**20:.1f} MiB.\n\nEdits: {where(result)}. Seconds: {where(cpu)}."
    )


def _share(row: Row) -> str:
    """Format a share of right edits, that of all kinds with its interval."""
    share = f"{row['success']:.0%}"
    right = round(row["success"] * row["n"])
    interval = share_interval([i < right for i in range(row["n"])])
    if row["kind"] != "all" or interval is None:
        return share
    return "{} [{:.0%}, {:.0%}]".format(share, *interval)


def vocabulary() -> str:
    """What Spark's instructions are made of."""
    from fluxfire.spark.edits import KINDS, LOOK_WORDINGS, SIDES
    from fluxfire.spark.grounds import GROUNDS
    from fluxfire.spark.things import NAMES, TINTS

    lists = {"things": NAMES, "colours": TINTS, "grounds": GROUNDS, "places": SIDES}
    words = "\n".join(f"- **{name}** ({len(of)}): {', '.join(of)}" for name, of in lists.items())
    wordings = {name: (edit.known, edit.novel) for name, edit in KINDS.items() if name != "look"}
    wordings |= {f"look: {name}": pair for name, pair in LOOK_WORDINGS.items()}
    rows = [
        (kind, *(f"“{_filled(some[0])}”" for some in known_and_novel))
        for kind, known_and_novel in wordings.items()
    ]
    return f"{words}\n\n{markdown(('kind', 'a wording shown', 'one held out'), rows)}"


def _filled(wording: str) -> str:
    """Put examples for what a wording leaves open."""
    return wording.format(
        it="cat", colour="blue", new="a red apple", place="on the left", to="to the top",
        where="on a beach", what="a beach",
    )  # fmt: skip


def eight_bits() -> str:
    """What the formats of eight bits do to Spark's edits, and what fewer steps do."""
    return _stacks("eight_bits_on_cpu.json")


def passes_on_spark() -> str:
    """What the passes do to Spark's edits, and what fewer steps do."""
    return _stacks("passes_on_spark.json")


def _stacks(file: str) -> str:
    result = load(file)
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
