"""What compiling takes, and what goes wrong in it."""

from __future__ import annotations

from regions.results import load, markdown, where


def cold() -> str:
    """From a fresh process to a picture, phase by phase."""
    result = load("cold.json")
    table = []
    for row in result["rows"]:
        spent, sizes = row["phases"], row["sizes"]
        table.append(
            (
                row["start"],
                *(f"{spent[name]:.1f}" for name in ("imports", "weights", "optimize")),
                f"{row['mega_cache']['load_seconds']:.1f}",
                *(
                    f"{size['seconds']:.1f} ({size['trace_seconds']:.1f} + "
                    f"{size['compile_seconds']:.1f}; {size['hits']} of "
                    f"{size['hits'] + size['misses']})"
                    for size in sizes
                ),
                f"{spent['an edit of two steps, warm']:.1f}",
            )
        )
    head = (
        "seconds", "imports", "weights", "optimize", "artifacts",
        *(f"first {size['size']} (tracing + compiling; graphs found)" for size in sizes), "again",
    )  # fmt: skip
    file = result["rows"][-1]["mega_cache"]["loaded_bytes"] / 2**20
    return (
        f"{markdown(head, table)}\n\nThe file has {file:.0f} MiB, the weights "
        f"{result['weights']['gib']:.1f} GiB. {where(result)}."
    )


def literal() -> str:
    """How long the article's own settings compiled."""
    result = load("literal.json")
    limit, seconds = result["limit_seconds"], result["seconds"]
    if not result["finished"]:
        said = f"had not finished its first two steps after {limit:.0f} s, and was stopped"
    else:
        said = f"took {seconds:.0f} s for two generations of two steps"
    return f"The article's literal preset (whole-model autotuning) {said}.\n\n{where(result)}."


def symfloat() -> str:
    """The crash of inductor, without and with the pass."""
    result = load("symfloat.json")
    rows = [("without", f"`{result['without']}`"), ("with InductorPatch", result["with"])]
    return f"{markdown(('', 'outcome'), rows)}\n\n{where(result)}."
