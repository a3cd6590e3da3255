"""Helpers for text output: tables, units, hints, pass spelling and text files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from html import escape
from pathlib import Path


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format a plain-text table.

    Args:
        head: names of the columns.
        rows: one cell for each column.

    Returns:
        The lines of the table in one string. No line ends in spaces.
    """
    cells = [list(head), *([str(c) for c in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * w for w in widths])
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def html_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format an HTML table, for notebooks.

    Args:
        head: names of the columns.
        rows: one cell for each column.
    """
    lines = [_html_row("th", head), *(_html_row("td", row) for row in rows)]
    return f"<table>{''.join(lines)}</table>"


def _html_row(tag: str, cells: Iterable[object]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(str(cell))}</{tag}>' for cell in cells)}</tr>"


def html_lines(lines: Iterable[str]) -> str:
    """Format each line as an HTML block, for notebooks. Leaves empty lines out."""
    return "".join(f"<div>{escape(line)}</div>" for line in lines if line)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file in one step: after a crash the file has its old or its new text."""
    scratch = path.with_suffix(".part")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def count_of(count: int, noun: str) -> str:
    """Format a number with its noun. The plural must end in s."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def with_article(noun: str) -> str:
    """Put `a` before a noun, or `an` if its first letter is a vowel."""
    return f"{'an' if noun[:1].lower() in set('aeiou') else 'a'} {noun}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint with the known name most similar to a misspelt one.

    Returns:
        Such as "; did you mean 'compile'?"; empty if no known name is similar.
    """
    close = closest(name, known)
    return f"; did you mean {close!r}?" if close else ""


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name most similar to a misspelt one, or the only one that it begins.

    Returns:
        A name; None if no known name is similar.
    """
    known = list(known)
    begun = [one for one in known if name and one.startswith(name)]
    similar = get_close_matches(name, known, n=1) or (begun if len(begun) == 1 else [])
    return similar[0] if similar else None


def extra_hint(extra: str) -> str:
    """Return the command that installs an extra of fluxfire.

    The command works whether fluxfire was installed from an index or from a clone: pip keeps the
    installed fluxfire, and adds only the missing packages.
    """
    return f'pip install "fluxfire[{extra}]"'


def human_bytes(count: int) -> str:
    """Format a number of bytes with its sign and a binary unit."""
    if count == 0:
        return "±0"
    size = float(abs(count))
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:  # noqa: PLR2004 - bytes in a KiB
        size /= 1024
        units.pop(0)
    digits = 0 if units[0] == "B" else 1
    return f"{'+' if count > 0 else '-'}{size:.{digits}f} {units[0]}"


def read_bytes(size: str | int) -> int:
    """Read an amount of memory: a number of bytes, or text such as `"16GiB"`, `"16 GB"`, `"512M"`.

    GiB, MiB and KiB are powers of 1024; GB, MB and KB are powers of 1000; a single letter counts as
    a power of 1024.

    Raises:
        ValueError: the text is no amount of memory, or it is not above 0.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)(b?)\s*", str(size), re.IGNORECASE)
    if isinstance(size, bool) or found is None or (found[3] and not found[2]):
        raise ValueError(f"{size!r} is no amount of memory; write such as '16GiB'")
    base = 1000 if found[2] and found[4] and not found[3] else 1024
    number: int = round(float(found[1]) * base ** " kmgt".index(found[2].lower() or " "))
    if number <= 0:
        raise ValueError(f"{size!r} is no amount of memory; it must be above 0")
    return number


def human_seconds(seconds: float) -> str:
    """Format a duration in seconds or milliseconds, with three digits or more."""
    number, unit = (seconds, "s") if seconds >= 0.9995 else (seconds * 1e3, "ms")  # noqa: PLR2004
    return f"{number:.0f} {unit}" if number >= 99.95 else f"{number:.3g} {unit}"  # noqa: PLR2004


def bullets(lines: Iterable[str]) -> str:
    """Format lines as a bullet list, for a message."""
    return "\n".join(f"  - {line}" for line in lines)


def spell(pass_: object) -> str:
    """Spell a pass as a user would write it: its repr without default settings."""
    if not is_dataclass(pass_):
        return repr(pass_)
    given = (
        f"{f.name}={getattr(pass_, f.name)!r}"
        for f in fields(pass_)
        if f.init and f.repr and getattr(pass_, f.name) != f.default
    )
    return f"{type(pass_).__name__}({', '.join(given)})"


def spell_non_defaults(pass_: object) -> str:
    """Spell a pass; return "" if all its settings are defaults."""
    text = spell(pass_)
    return "" if not is_dataclass(pass_) or text == f"{type(pass_).__name__}()" else text


def settings_line(spellings: Iterable[str]) -> list[str]:
    """Join the results of `spell_non_defaults` to one line; no line if all are empty."""
    if text := ", ".join(filter(None, spellings)):
        return [f"settings: {text}"]
    return []
