"""Schedules for the real FLUX.1 Kontext, from statistics of it that others published.

    python benchmarks/kontext_schedule.py --warmup 8 --cap 2    # `balanced`
    python benchmarks/kontext_schedule.py --warmup 6 --cap 3    # `fast`

We have no real weights to calibrate with. But the products that `fluxfire.calibrate` measures can
be estimated from three published statistics of the real model, at 28 steps and a megapixel:

- how long the blocks' residual is at each step, beside the step before (MagCache);
- how long the velocity is at each step, beside the step before (RegionE). It is the more exact of
  the two, but it is after the last layer;
- how much the output changes in a step (TeaCache's polynomial for Kontext: 4% where least).

A residual is then a vector of known length that turns by a known angle in a plane. Dynamic
programming over these products gives the schedule, as in `fluxfire.calibrate`. No real edit was
made to confirm it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from fluxfire.bench.calibration.proposing import Bounds, Errors, propose
from fluxfire.bench.calibration.recording import Trace

MAG_CACHE = (
    1.19531, 1.07812, 1.02344, 1.03125, 1.00781, 1.02344, 1.01562, 1.01562, 1.0, 1.01562, 1.0,
    1.00781, 1.0, 1.00781, 1.0, 1.00781, 0.99609, 1.01562, 0.99219, 1.0, 0.99219, 0.98438, 0.99609,
    0.96484, 0.96094, 0.9375, 0.93359,
)  # fmt: skip
"""Length of the residual at steps 1 to 27 of 28, beside the step before.

Source: MagCache's ratios for Kontext (https://github.com/Zehong-Ma/MagCache, commit df81cb1).
"""
REGION_E = (
    0.8352, 0.9986, 1.0090, 1.0097, 1.0161, 1.0152, 1.0160, 1.0173, 1.0177, 1.0199, 1.0213, 1.0203,
    1.0257, 1.0236, 1.0235, 1.0278, 1.0302, 1.0311, 1.0352, 1.0371, 1.0391, 1.0459, 1.0498, 1.0581,
    1.0693, 1.0866, 1.1090,
)  # fmt: skip
"""The length of the velocity likewise, times 1 + the difference of the noise levels.

Source: the constants gamma of RegionE 0.1.0 for Kontext (https://pypi.org/project/regione).
"""
LEAST_CHANGE = 0.037
"""Relative change of the output in a step where the input barely changes.

Source: the constant term of TeaCache's polynomial for Kontext
(https://github.com/ali-vilab/TeaCache, commit 7c10efc).
"""
PUBLISHED_STEPS = 28
_SHIFT = math.exp(1.15)


def sigmas(steps: int) -> Tensor:
    """Return FLUX's noise levels for a picture of a megapixel, and 0 at the end."""
    even = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    shifted = _SHIFT / (_SHIFT + 1 / even - 1)
    return torch.cat([shifted, shifted.new_zeros(1)])


def trace(steps: int, lengths: Sequence[float], *, change: float = LEAST_CHANGE) -> Trace:
    """Return the products that published statistics imply, for generations of any length.

    Args:
        steps: of the generation.
        lengths: the vector's length at steps 1 to 27 of 28, beside the step before.
        change: relative change of the output in one of 28 steps. What the lengths leave of it is
            the angle by which the vector turns.
    """
    ratios = torch.tensor(lengths, dtype=torch.float64)
    turned = (change**2 - (ratios - 1) ** 2).clamp_min((change / 2) ** 2).sqrt()
    length = torch.cat([ratios.new_ones(1), ratios.cumprod(0)])
    angle = torch.cat([ratios.new_zeros(1), turned.cumsum(0)])
    known, asked = sigmas(PUBLISHED_STEPS)[:-1], sigmas(steps)
    # By the step's number, in which both curves are even, and not by the noise level.
    place = _place(asked[:-1], known)
    vector = _between(length, place), _between(angle, place)
    products = vector[0] * vector[0][:, None] * (vector[1] - vector[1][:, None]).cos()
    return Trace(asked, products, torch.zeros_like(products))


def _place(asked: Tensor, known: Tensor) -> Tensor:
    """Return the number of the step of `known`, with a fraction, that has each noise level."""
    rising = known.flip(0)
    above = torch.searchsorted(rising, asked.contiguous()).clamp(1, len(known) - 1)
    share = (asked - rising[above - 1]) / (rising[above] - rising[above - 1])
    return len(known) - 1 - (above - 1 + share)


def _between(values: Tensor, place: Tensor) -> Tensor:
    """Interpolate between a list's values; beyond its ends, continue the line."""
    left = place.floor().clamp(0, len(values) - 2).long()
    return values[left] + (place - left) * (values[left + 1] - values[left])


def velocity_lengths() -> list[float]:
    """Return the length of the velocity at steps 1 to 27, beside the step before."""
    differences = sigmas(PUBLISHED_STEPS)[:-1].diff()
    return [g * (1 + float(d)) for g, d in zip(REGION_E, differences, strict=True)]


@cache
def schedules(steps: int, *, warmup: int, tail: int, cap: int) -> dict[int, tuple[int, ...]]:
    """Return the steps to skip, for each possible number of computed steps.

    Args:
        steps: of the generation.
        warmup: how many of 28 steps are computed at first.
        tail: how many of 28 steps are computed at last.
        cap: most skipped steps in a row.
    """
    traces = [trace(steps, lengths) for lengths in (MAG_CACHE, velocity_lengths())]
    first, last = (math.ceil(n * steps / PUBLISHED_STEPS) for n in (warmup, tail))
    return propose(Errors(traces), Bounds(first, last, cap, early=1.0))


def main() -> None:
    """Print schedules."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("steps", type=int, nargs="*", default=[28, 20, 50])
    parser.add_argument("--warmup", type=int, default=8, help="of 28 steps")
    parser.add_argument("--tail", type=int, default=2, help="of 28 steps")
    parser.add_argument("--cap", type=int, default=3, help="most skipped steps in a row")
    arguments = parser.parse_args()
    for steps in arguments.steps:
        found = schedules(steps, warmup=arguments.warmup, tail=arguments.tail, cap=arguments.cap)
        for computed in sorted(found, reverse=True):
            drawn = "".join("." if i in found[computed] else "C" for i in range(steps))
            print(f"{computed:3} of {steps}  {drawn}  {found[computed]}")


if __name__ == "__main__":
    main()
