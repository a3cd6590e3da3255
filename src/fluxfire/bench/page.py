"""Writes a benchmark as one self-contained HTML file: tables, plots and pictures."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from fluxfire.bench.contenders import EAGER
from fluxfire.bench.examples import Example
from fluxfire.bench.rows import Row
from fluxfire.bench.tables import format_decibels, remarks, tables
from fluxfire.pictures import AMPLIFIED, draw_difference

_TEMPLATE = Path(__file__).with_name("page.html.jinja")
_LONGEST_SIDE = 512


@dataclass(frozen=True)
class Strip:
    """The pictures of one edit, side by side.

    Attributes:
        title: the title.
        pictures: captions and data: URLs.
    """

    title: str
    pictures: list[tuple[str, str]]


def page(result: dict[str, Any], rows: Sequence[Row], examples: Sequence[Example]) -> str:
    """Render a result as HTML.

    Args:
        result: a result as `fluxfire bench` saves it.
        rows: the rows of the result, which have the pictures.
        examples: the edited examples.

    Returns:
        The page; it loads nothing from elsewhere.
    """
    from jinja2 import Environment, StrictUndefined

    drawn: dict[str, str] = {}
    if find_spec("matplotlib") is not None:
        from fluxfire.bench import plots

        drawn = {name: svg[svg.index("<svg") :] for name, svg in plots.draw(result).items()}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        result=result,
        notes=[*result["notes"], *remarks(result["rows"])],
        tables=tables(result),
        plots=drawn,
        strips=list(_strips(rows, examples)),
        raw=json.dumps(result, indent=1),
    )


def _strips(rows: Sequence[Row], examples: Sequence[Example]) -> Iterator[Strip]:
    """Yield each contender's worst picture beside the plain one."""
    plain = {row.workload.name: row for row in rows if row.contender.name == EAGER}
    for row in rows:
        base = plain.get(row.workload.name)
        if base is None or row is base or EAGER not in row.quality:
            continue
        quality = row.quality[EAGER]
        number = quality.worst
        near, example = quality.similarities[number], examples[number]
        made, wanted = row.pictures[number], base.pictures[number]
        shown = [
            ("plain", wanted),
            ("this", made),
            (f"difference × {AMPLIFIED}", draw_difference(made, wanted)),
        ]
        if example.picture is not None:
            shown.insert(0, ("reference", example.picture))
        if example.target is not None:
            shown.append(("exact target", example.target))
        right = {True: ", right", False: ", not right", None: ""}[row.right[number]]
        title = (
            f"{row.contender.name}, {row.workload.name}: the worst of {len(quality.similarities)}, "
            f"“{example.instruction}”, PSNR {format_decibels(near.psnr)} dB{right}"
        )
        yield Strip(title, [(caption, _data(picture)) for caption, picture in shown])


def _data(picture: Image.Image) -> str:
    """Return a picture as a data: URL, at most 512 pixels a side."""
    picture = picture.copy()
    picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
