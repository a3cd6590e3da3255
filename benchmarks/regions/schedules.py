"""Which steps to skip on Spark, and how to predict them."""

from __future__ import annotations

from fluxfire.bench.tables import format_measure
from regions.results import Row, load, markdown, where


def schedules() -> str:
    """Caches and schedules on many edits, beside plain with as many steps or seconds."""
    result = load("schedules_on_spark.json")
    plain = {row["name"]: row for row in result["rows"]}
    table = []
    for row in result["rows"]:
        for what in ("as many steps", "as many seconds"):
            if (beside := row.get(f"beside {what}")) is None:
                continue
            fewer = plain[f"plain, {beside['steps']} steps"]
            table.append(
                (
                    row["name"],
                    f"{row['work']:.1f}",
                    _measure(row),
                    f"{beside['steps']}, {what}",
                    _measure(fewer),
                    "{mean:+.1f} [{low:+.1f}, {high:+.1f}]".format(**beside),
                )
            )
    head = (
        "", f"work, of {result['steps']} steps", "PSNR, dB: mean [95%] (worst)",
        "plain steps", "their PSNR", "difference [95%]",
    )  # fmt: skip
    return f"{markdown(head, table)}\n\n{result['examples']} held-out edits. {where(result)}."


def _measure(row: Row) -> str:
    psnr = row["psnr"]
    return "{mean:.1f} [{low:.1f}, {high:.1f}] ({worst:.1f})".format(**psnr)


def predictors() -> str:
    """Ways to predict a skipped step, at three schedules."""
    result = load("predictors.json")
    found = {(row["way"], row["schedule"]): row for row in result["rows"]}
    ways = list(dict.fromkeys(row["way"] for row in result["rows"]))
    cells = [
        (way, *(_cell(found.get((way, name))) for name in result["schedules"])) for way in ways
    ]
    head = ("", *(f"{name} of {result['steps']} computed" for name in result["schedules"]))
    masks = "\n".join(f"    {name}  {mask}" for name, mask in result["schedules"].items())
    return (
        f"{markdown(head, cells)}\n\nPSNR to plain in dB: mean [95%] (worst). The schedules "
        f"(C computed, . skipped):\n\n{masks}\n\n{result['examples']} held-out edits. "
        f"{where(result)}."
    )


def _cell(row: Row | None) -> str:
    return "-" if row is None else format_measure(row["psnr"])
