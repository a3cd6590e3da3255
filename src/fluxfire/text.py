"""Plain-text tables, units, hints and files, for everything that fluxfire prints or writes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Lay rows out in columns under a head.

    Args:
        head: names of the columns.
        rows: cells, as many in each row as there are columns.

    Returns:
        The table's lines, joined; no line ends in spaces.
    """
    cells = [list(head), *([str(c) for c in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * w for w in widths])
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def write_whole(path: Path, text: str) -> None:
    """Write a text file, replacing it in one step, so that a crash leaves the old one whole."""
    scratch = path.with_suffix(".part")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def count_of(count: int, noun: str) -> str:
    """Write a number with its noun, whose plural takes an s."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def with_article(noun: str) -> str:
    """Write a noun behind `a`, or behind `an` where its first letter is a vowel."""
    return f"{'an' if noun[:1].lower() in set('aeiou') else 'a'} {noun}"


def meant_hint(name: str, known: Iterable[str]) -> str:
    """Say which of the known names a wrong one may have meant; nothing if none is near."""
    close = get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def extra_hint(extra: str) -> str:
    """Say how to install an extra of fluxfire.

    The command holds wherever fluxfire itself came from, an index or a clone: pip leaves what is
    installed as it is, and adds what the extra lacks.
    """
    return f'pip install "fluxfire[{extra}]"'


def human_bytes(count: int) -> str:
    """Write a number of bytes with its sign and a binary unit."""
    if count == 0:
        return "±0"
    size = float(abs(count))
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:  # noqa: PLR2004 - a KiB is what it is
        size /= 1024
        units.pop(0)
    digits = 0 if units[0] == "B" else 1
    return f"{'+' if count > 0 else '-'}{size:.{digits}f} {units[0]}"


def human_seconds(seconds: float) -> str:
    """Write a duration in seconds or milliseconds, with three digits or more."""
    number, unit = (seconds, "s") if seconds >= 0.9995 else (seconds * 1e3, "ms")  # noqa: PLR2004
    return f"{number:.0f} {unit}" if number >= 99.95 else f"{number:.3g} {unit}"  # noqa: PLR2004


def bullets(lines: Iterable[str]) -> str:
    """Write lines one below the other, as the parts of a message."""
    return "\n".join(f"  - {line}" for line in lines)


def spelled(pass_: object) -> str:
    """Write a pass as a user would: its repr without the settings that are the defaults."""
    if not is_dataclass(pass_):
        return repr(pass_)
    given = (
        f"{f.name}={getattr(pass_, f.name)!r}"
        for f in fields(pass_)
        if f.init and f.repr and getattr(pass_, f.name) != f.default
    )
    return f"{type(pass_).__name__}({', '.join(given)})"


def own_settings(pass_: object) -> str:
    """Spell a pass; nothing if all its settings are the defaults."""
    text = spelled(pass_)
    return "" if not is_dataclass(pass_) or text == f"{type(pass_).__name__}()" else text


def settings_line(told: Iterable[str]) -> list[str]:
    """Put together what `own_settings` says of several passes: a line, or none."""
    if said := ", ".join(filter(None, told)):
        return [f"settings: {said}"]
    return []
