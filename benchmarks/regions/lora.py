"""What a LoRA costs: a step with it, and the first edit after it changes."""

from __future__ import annotations

from regions.results import load, markdown, where

_EVENTS = {
    "loaded": "loaded", "scaled": "scaled", "scale of a call": "a call with `scale`",
    "exchanged": "another one", "unloaded": "unloaded",
}  # fmt: skip


def lora_speed() -> str:
    """Lists of passes with and without a LoRA."""
    result = load("lora_speed.json")
    rows = [
        (
            row["name"],
            f"{row['without']['median'] * 1e3:.0f} ms",
            f"{row['with']['median'] * 1e3:.0f} ms",
            *(f"{row[e]['beyond']:.1f} s, {row[e]['compilations']}" for e in _EVENTS),
        )
        for row in result["rows"]
    ]
    head = ("", "a step without", "with a LoRA", *_EVENTS.values())
    return (
        f"{markdown(head, rows)}\n\nA LoRA of rank {result['rank']} on all projections, outputs "
        f"and MLPs of the blocks. The last columns say how much longer the first edit after a "
        f"change takes than the second, and how many graphs it compiles. Random weights of FLUX's "
        f"size, 1024 x 1024. {where(result)}."
    )
