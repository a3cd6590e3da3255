"""How Spark behaves beside the real model: curves A to K."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean
from typing import Any

from regions.results import Row, load, markdown, where

MODELS = {"Spark": "realism.json", "the first Spark": "realism_spark1.json"}
KONTEXT_MAGNITUDES = (
    1.19531, 1.07812, 1.02344, 1.03125, 1.00781, 1.02344, 1.01562, 1.01562, 1.0, 1.01562, 1.0,
    1.00781, 1.0, 1.00781, 1.0, 1.00781, 0.99609, 1.01562, 0.99219, 1.0, 0.99219, 0.98438, 0.99609,
    0.96484, 0.96094, 0.9375, 0.93359,
)  # fmt: skip
"""Steps 1 to 27: what the blocks add, over what they added a step before. From MagCache's code."""
KONTEXT_SPEEDS = (
    0.8255, 0.9864, 0.9961, 0.996, 1.0016, 0.9999, 0.9998, 1.0001, 0.9994, 1.0003, 1.0004, 0.998,
    1.0017, 0.9978, 0.9958, 0.9977, 0.9975, 0.9956, 0.9963, 0.9944, 0.992, 0.9935, 0.9914, 0.9923,
    0.9944, 1.0004, 1.0084,
)  # fmt: skip
"""Steps 1 to 27: the velocity's norm over that of the step before. From RegionE's code."""
FLUX_HITS = {"0.06": 5.0, "0.08": 11.0, "0.12": 14.0, "0.2": 19.0}
_MIDDLE = slice(4, 24)  # steps 5 to 24


@dataclass(frozen=True)
class Curve:
    """One line of the table.

    Attributes:
        name: what is measured.
        real: what is known of the real model.
        wanted: what a stand-in should show.
        shown: formats a model's curves.
        met: whether they are as wanted.
    """

    name: str
    real: str
    wanted: str
    shown: Callable[[Row], str]
    met: Callable[[Row], bool]


def _psnr(*path: str, of: str = "edits") -> Callable[[Row], float]:
    def read(curves: Row) -> float:
        found: Any = curves[of]
        for key in path:
            found = found[key]
        return float(found["mean"])

    return read


def _plain(steps: int, most: float, real: str) -> Curve:
    value, words = (_psnr("plain", str(steps), of=of) for of in ("edits", "words"))
    return Curve(
        f"plain with {steps} steps", real, f"at most {most:.0f} dB",
        lambda c: f"{value(c):.1f} dB (from words {words(c):.1f})", lambda c: value(c) <= most,
    )  # fmt: skip


def _hits(curves: Row) -> list[float]:
    return [curves["words"]["hits"][threshold]["hits"] for threshold in FLUX_HITS]


def _off(curves: Row, series: str, real: tuple[float, ...], part: slice) -> float:
    pairs = zip(curves["edits"][series][part], real[part], strict=True)
    return max(float(abs(one - other)) for one, other in pairs)


def _ends(curves: Row) -> float:
    return max(
        _off(curves, "magnitudes", KONTEXT_MAGNITUDES, part) for part in (slice(4), slice(24, 27))
    )


def _predictions(name: str) -> Callable[[Row], tuple[float, float, float]]:
    hold, linear, quadratic = (_psnr(name, p) for p in ("hold", "linear", "quadratic"))
    return lambda c: (hold(c), linear(c), quadratic(c))


def _three(of: Callable[[Row], tuple[float, float, float]]) -> Callable[[Row], str]:
    return lambda c: "hold {:.1f}, linear {:.1f}, quadratic {:.1f}".format(*of(c))


def _warm_up(curves: Row, of: str = "edits") -> float:
    with_it, without = (_psnr(f"{how} warm-up", "hold", of=of) for how in ("with", "without"))
    return with_it(curves) - without(curves)


def _drift(curves: Row) -> list[tuple[float, float]]:
    return [
        tuple(pair) for pair in curves["edits"]["drift of reference keys and values"]["from step 4"]
    ]


def _late_drift(curves: Row) -> tuple[float, float]:
    keys, values = zip(*_drift(curves)[1:], strict=True)
    return mean(keys), mean(values)


_short, _long = _predictions("short skips"), _predictions("long skips")
CURVES = (
    _plain(14, 34, "26.2 dB with about 16 (Kontext, mean of 1026 edits)"),
    _plain(8, 28, ""),
    Curve(
        "first-block hits at 0.06, 0.08, 0.12 and 0.20, no warm-up, from words",
        "5, 11, 14 and 19 (FLUX.1-dev)", "within 3",
        lambda c: ", ".join(f"{n:.1f}" for n in _hits(c)),
        lambda c: all(abs(a - b) <= 3 for a, b in zip(_hits(c), FLUX_HITS.values(), strict=True)),
    ),
    Curve(
        "what the blocks add, step by step, steps 5 to 24", "0.96 to 1.02 times the step before", "within 0.02",
        lambda c: f"off by {_off(c, 'magnitudes', KONTEXT_MAGNITUDES, _MIDDLE):.3f}",
        lambda c: _off(c, "magnitudes", KONTEXT_MAGNITUDES, _MIDDLE) <= 0.02,
    ),
    Curve(
        "the same, steps 1 to 4 and 25 to 27", "1.20 first, 0.93 last", "within 0.06",
        lambda c: f"off by {_ends(c):.3f}", lambda c: _ends(c) <= 0.06,
    ),
    Curve(
        "the velocity's norm, step by step", "0.83 first, then 0.99 to 1.01", "within 0.06",
        lambda c: f"off by {_off(c, 'speeds', KONTEXT_SPEEDS, slice(0, 27)):.3f}",
        lambda c: _off(c, "speeds", KONTEXT_SPEEDS, slice(0, 27)) <= 0.06,
    ),
    Curve(
        "at most 2 skips in a row, dB", "linear better than hold", "linear better than hold",
        _three(_short), lambda c: _short(c)[1] > _short(c)[0],
    ),
    Curve(
        "up to 6 skips in a row, dB", "26.2, 20.9 for hold and linear (FLUX.1-dev)", "quadratic worst",
        _three(_long), lambda c: _long(c)[2] == min(_long(c)),
    ),
    Curve(
        "a warm-up at equal hits (14 of 28, hold)", "6 to 9 dB better", "at least 4 dB better",
        lambda c: f"{_warm_up(c):+.1f} dB (from words {_warm_up(c, 'words'):+.1f})", lambda c: _warm_up(c) >= 4,
    ),
    Curve(
        "reference keys and values, steps 4 to 27, middle and last block", "0.3 to 0.5 and 0.5 to 0.7", "0.3 to 0.7",
        lambda c: "{:.2f} and {:.2f}".format(*_late_drift(c)),
        lambda c: all(0.3 <= d <= 0.7 for d in _late_drift(c)),
    ),
    Curve(
        "one unit of bfloat16's last place on each block's output", "32 to 40 dB (other kernels)", "30 to 45 dB",
        lambda c: f"{_psnr('rounding')(c):.1f} dB", lambda c: 30 <= _psnr("rounding")(c) <= 45,
    ),
    Curve(
        "all products in eight bits", "25 to 27 dB (FLUX.1-dev, INT8)", "",
        lambda c: f"{_psnr('eight bits')(c):.1f} dB", lambda _: True,
    ),
)  # fmt: skip


def realism() -> str:
    """Each curve for the real model and for every model that was measured."""
    results = {name: load(file) for name, file in MODELS.items()}
    rows = [
        (
            curve.name,
            curve.real,
            curve.wanted,
            *(_cell(curve, result["curves"]) for result in results.values()),
        )
        for curve in CURVES
    ]
    said = "; ".join(f"{name}: {r['examples']} edits, {where(r)}" for name, r in results.items())
    head = ("28 steps; PSNR to plain with 28", "the real model", "wanted", *results)
    return f"{markdown(head, rows)}\n\n{said}."


def _cell(curve: Curve, curves: Row) -> str:
    mark = "" if not curve.wanted else (" ✓" if curve.met(curves) else " ✗")
    return curve.shown(curves) + mark
