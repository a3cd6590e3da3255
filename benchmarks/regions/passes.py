"""Every pass: what it is, by its own word, and what it was measured to do."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from fluxfire import passes as own
from fluxfire.protocol import STAGES, Pass
from regions.results import Row, load, markdown, where

_ASIDE = ("inductor-patch", "memory-layout", "encoding-cache", "mega-cache")
"""Passes that have no part in a step: what they seem to do to one is noise."""
_NAMES = vars(own) | {"PosixPath": Path}  # what a pass's repr is made of
_HEAD = (
    "pass", "what it does", "stage (slot)", "exactness", "measured: without it → with it",
    "GiB peak", "LoRA", "needs",
)  # fmt: skip


def every_pass() -> str:
    """One row a pass, or two where a setting makes another of it."""
    result, lora = load("passes_in_company.json"), load("lora.json")
    rows = {row["contender"]: row for row in result["rows"]}
    tried = {row["name"]: row for row in lora["rows"]}
    seen: set[type[Pass]] = set()
    table = []
    for name, pass_, without, with_it in sorted(_pairs(rows), key=lambda p: _place(p[1])):
        cls = type(pass_)
        usual = cls not in seen  # what is measured may have settings that only timing needs
        seen.add(cls)
        table.append(
            (
                f"`{pass_.name}`<br>`{cls.__name__}`" if usual else f"`{pass_!r}`",
                (cls.__doc__ or "").splitlines()[0].rstrip("."),
                pass_.stage + (f" ({pass_.slot})" if pass_.slot else ""),
                (cls() if usual else pass_).exactness,
                "<br>".join(_measured(pass_.name, rows, without, with_it)),
                _peak(without["peak_gib"], with_it["peak_gib"]),
                _lora(tried[name]),
                "; ".join(re.findall(r"^ *Needs (.+?)\.(?:\s|$)", cls.__doc__ or "", re.MULTILINE)),
            )
        )
    noise = max(abs(_gain(*pair)) for name, _, *pair in _pairs(rows) if name in _ASIDE)
    aside = ", ".join(f"`{name}`" for name in _ASIDE)
    steps = rows["faithful"]["workload"]["steps"]
    said = (
        f"A step of `faithful`, the median of {steps}, without the pass and with it; eager took "
        f"{_ms(rows['eager']['step'])} ms. Passes that have no part in a step ({aside}) moved it "
        f"by up to {noise:.1%}: less than that is noise. The caches left steps out on a schedule. "
        f"{where(result)}. Encoding: {where(load('freshness.json'))}. LoRA: loaded before "
        f"`optimize` and after, on the tiny pipeline; "
        f"{where(lora)}."
    )
    return f"{markdown(_HEAD, table)}\n\n{said}"


def _pairs(rows: dict[str, Row]) -> Iterator[tuple[str, Pass, Row, Row]]:
    """Iterate over the passes, each with a name, and the row without it and with it."""
    faithful = rows["faithful"]
    for contender, row in rows.items():
        how, _, name = contender.partition(" ")
        if how in ("with", "without"):
            less, more = (faithful, row) if how == "with" else (row, faithful)
            (found,) = (p for p in more["passes"] if p not in less["passes"])
            yield name, eval(found, _NAMES), less, more  # noqa: S307 - from our own file


def _place(pass_: Pass) -> tuple[int, str]:
    """Sort by stage, then by name."""
    return STAGES.index(pass_.stage), pass_.name


def _ms(sample: Row) -> str:
    return f"{sample['median'] * 1e3:.0f}"


def _gain(without: Row, with_it: Row) -> float:
    """Return by how much of itself a pass moves the median step."""
    change: float = with_it["step"]["median"] / without["step"]["median"] - 1
    return change


def _measured(name: str, rows: dict[str, Row], without: Row, with_it: Row) -> Iterator[str]:
    """Say what a pass does to a step, and what else it is for."""
    before, after = (_ms(row["step"]) for row in (without, with_it))
    yield f"a step {before} → {after} ms ({_gain(without, with_it):+.1%})"
    if with_it["hit_step"]:
        yield f"a hit {_ms(with_it['hit_step'])} ms"
    if with_it["reuse_step"]:
        yield f"a step that reuses {_ms(with_it['reuse_step'])} ms"
    eager = rows["eager"]["step"]
    more: dict[str, Callable[[], str]] = {
        "compile": lambda: f"alone {_ms(eager)} → {_ms(rows['without fused-blocks']['step'])} ms",
        "fused-blocks": lambda: f"alone {_ms(eager)} → {_ms(rows['without compile']['step'])} ms",
        "encoding-cache": lambda: f"encoding {_encoding()}",
        "memory-layout": lambda: f"decoding {_phases('decoding', without, with_it)}",
        "mega-cache": _first_edit,
        "inductor-patch": lambda: f"its trigger crashes → {load('symfloat.json')['with']}",
    }
    if name in more:
        yield more[name]()


def _encoding() -> str:
    """Encoding a prompt and a picture, plain and known: measured apart, since that changed."""
    of = load("freshness.json")["encoding"]
    return " → ".join(f"{of[name]['median']:.0f}" for name in ("plain", "known")) + " ms"


def _phases(kind: str, *rows: Row) -> str:
    """Add up the phases of a kind."""
    spent = (
        sum(took["median"] for name, took in row["phases"].items() if name.endswith(kind))
        for row in rows
    )
    return " → ".join(f"{seconds * 1e3:.0f}" for seconds in spent) + " ms"


def _first_edit() -> str:
    """Say what artifacts do to the first edit of a process."""
    rows = {row["start"]: row["sizes"][0]["seconds"] for row in load("cold.json")["rows"]}
    before, after = (rows[f"{how} artifacts"] for how in ("without", "with"))
    return f"the first edit of a process {before:.1f} → {after:.1f} s"


def _peak(without: float, with_it: float) -> str:
    """Say what a pass does to the most memory that an edit takes, to a tenth of a GiB."""
    nothing = abs(with_it - without) < 0.05  # noqa: PLR2004 - half of what is shown
    return "same" if nothing else f"{without:.1f} → {with_it:.1f}"


def _lora(row: Row) -> str:
    """Say what became of a LoRA that came before the pass, and after."""
    before, after = (row[when]["outcome"] for when in ("before", "after"))
    return before if before == after else f"{before} if there before; afterwards {after} by name"
