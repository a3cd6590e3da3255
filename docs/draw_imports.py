"""Draws which part of the package imports which, from its source and the map of it.

    python docs/draw_imports.py           # rewrite pages/assets/imports.svg
    python docs/draw_imports.py --check   # status 1 if the drawing is not up to date

The map is the listing in pages/explanation/architecture.md: its order is the order of the layers,
and a part may import only from those below it. `tests/test_architecture.py` holds the code to it.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "fluxfire"
PAGE = ROOT / "docs" / "pages" / "explanation" / "architecture.md"
DRAWING = ROOT / "docs" / "pages" / "assets" / "imports.svg"

When = Literal["at once", "when used", "for annotations"]
"""When an import runs: with its module, in a function, or never (under TYPE_CHECKING)."""
Arrows = dict[tuple[str, str], set[When]]
"""By (who imports, what is imported): when. Files relative to the package, or parts of the map."""

CELL, LABEL, MARGIN = 18, 132, 8


def parts() -> list[str]:
    """List the map's parts, from the top: files, and folders, which end in a slash."""
    text = PAGE.read_text()
    listing = text[text.index("src/fluxfire/\n") :].split("```")[0]
    return re.findall(r"^  ([\w/]+(?:\.py|/)) {2,}\S", listing, re.MULTILINE)


def files() -> list[str]:
    """List the package's files, relative to it."""
    return sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))


def part_of(file: str, among: Sequence[str]) -> str | None:
    """Return the part that a file belongs to: itself, or the innermost folder around it."""
    around = [part for part in among if file == part or (part[-1] == "/" and file.startswith(part))]
    return max(around, key=len, default=None)


def between_files() -> Arrows:
    """Find what the package's files import from each other.

    What an `__init__.py` names under TYPE_CHECKING, it loads when it is used.
    """
    known = set(files())
    found: Arrows = {}
    for file in sorted(known):
        for name, when in _imports(ast.parse((PACKAGE / file).read_text()), "at once"):
            path = "/".join(name.split(".")[1:])
            for other in (f"{path}.py", f"{path}/__init__.py".lstrip("/")):
                if other in known and other != file:
                    lazy = when == "for annotations" and file.endswith("__init__.py")
                    found.setdefault((file, other), set()).add("when used" if lazy else when)
    return found


def between_parts(arrows: Arrows, among: Sequence[str]) -> Arrows:
    """Put together what the files of each part import from those of another."""
    found: Arrows = {}
    for (file, other), when in arrows.items():
        ends = (part_of(file, among) or file, part_of(other, among) or other)
        if ends[0] != ends[1]:
            found.setdefault(ends, set()).update(when)
    return found


def _imports(node: ast.AST, when: When) -> Iterator[tuple[str, When]]:
    """Iterate over the modules of the package that are imported below a node."""
    for child in ast.iter_child_nodes(node):
        inside = when
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            inside = "for annotations"
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and when == "at once":
            inside = "when used"
        elif isinstance(child, ast.Import):
            yield from ((name.name, when) for name in child.names if _ours(name.name))
        elif isinstance(child, ast.ImportFrom) and child.level:
            raise NotImplementedError(f"line {child.lineno}: relative imports are not followed")
        elif isinstance(child, ast.ImportFrom) and _ours(child.module or ""):
            for name in child.names:
                yield from ((whole, when) for whole in _taken(str(child.module), name.name))
        yield from _imports(child, inside)


def _ours(module: str) -> bool:
    return module.split(".", maxsplit=1)[0] == PACKAGE.name


def _taken(module: str, name: str) -> Iterator[str]:
    """Say what `from module import name` takes: a module of that name, or what the module holds.

    The version is there before anything else of the package is.
    """
    inner = PACKAGE.joinpath(*module.split(".")[1:], name)
    if inner.is_dir() or inner.with_suffix(".py").is_file():
        yield f"{module}.{name}"
    elif name != "__version__":
        yield module


def draw(among: Sequence[str], arrows: Mapping[tuple[str, str], set[When]]) -> str:
    """Draw a table of dots: the part of a row imports that of a column.

    Returns:
        An SVG.
    """
    side = CELL * len(among)
    width = height = LABEL + side + MARGIN
    place = {part: CELL * i + CELL / 2 for i, part in enumerate(among)}
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">',
        "<title>Which part of fluxfire imports which</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<g transform="translate({LABEL} {LABEL})" font-family="monospace" font-size="12">',
    ]
    for part, at in place.items():
        lines += [
            f'<path d="M0 {at:g}H{side}M{at:g} 0V{side}" stroke="#ececec"/>',
            f'<text x="-6" y="{at + 4:g}" text-anchor="end">{part}</text>',
            f'<text transform="translate({at + 4:g} -6) rotate(-90)">{part}</text>',
        ]
    for at in place.values():
        corner = at - CELL / 2
        lines.append(
            f'<rect x="{corner:g}" y="{corner:g}" width="{CELL}" height="{CELL}" fill="#d9d9d9"/>'
        )
    for (part, other), when in sorted(arrows.items()):
        lines.append(_dot(place[other], place[part], when))
    lines += _legend(side)
    return "\n".join([*lines, "</g>", "</svg>", ""])


def _dot(x: float, y: float, when: set[When]) -> str:
    """Draw an import by the earliest time that it runs."""
    centre = f'<circle cx="{x:g}" cy="{y:g}"'
    if "at once" in when:
        return f'{centre} r="5" fill="#b5381c"/>'
    if "when used" in when:
        return f'{centre} r="4.25" fill="#ffffff" stroke="#b5381c" stroke-width="1.5"/>'
    return f'{centre} r="2" fill="#b5381c"/>'


def _legend(side: int) -> Iterator[str]:
    """Explain the dots in the half that stays empty."""
    x, y = CELL, side - 5 * CELL
    said: tuple[tuple[str, set[When]], ...] = (
        ("the row imports the column at once", {"at once"}),
        ("when it is used", {"when used"}),
        ("for annotations only", {"for annotations"}),
    )
    yield f'<rect x="2" y="{y - CELL}" width="{18 * CELL}" height="{6 * CELL - 2}" fill="#ffffff"/>'
    for i, (words, when) in enumerate(said):
        yield _dot(x, y + i * CELL, when)
        yield f'<text x="{x + 14}" y="{y + i * CELL + 4}">{words}</text>'
    yield f'<text x="{x - 6}" y="{y + 3 * CELL + 10}">A dot in this half would point up.</text>'


def main() -> int:
    """Rewrite the drawing, or check it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    drawn = draw(parts(), between_parts(between_files(), parts()))
    if DRAWING.is_file() and DRAWING.read_text() == drawn:
        return 0
    print(f"{'stale' if arguments.check else 'written'}: {DRAWING.relative_to(ROOT)}")
    if not arguments.check:
        DRAWING.write_text(drawn)
    return int(arguments.check)


if __name__ == "__main__":
    sys.exit(main())
