"""Named lists of passes: plain tuples, to slice and extend."""

from __future__ import annotations

from typing import Literal, get_args

from fluxfire.errors import PlanError
from fluxfire.passes import (
    Compile,
    FirstBlockCache,
    FusedBlocks,
    InductorPatch,
    MegaCache,
    MemoryLayout,
    QKVFusion,
    Schedule,
)
from fluxfire.protocol import Pass
from fluxfire.text import did_you_mean

__all__ = ["PresetName", "article", "balanced", "faithful", "fast", "named"]

faithful: tuple[Pass, ...] = (InductorPatch(), FusedBlocks(), Compile())
"""Nothing lossy: all steps, all tokens, the plain precision. What `optimize(pipe)` applies.

Measured on an H100, random weights: 1.37 times as fast as eager for an edit at 1024 x 1024 in 28
steps. Compiled kernels round differently, and on real models that alone moves a picture: on
FLUX.1-dev compiled and eager pictures have a PSNR of 22 and 28 dB to each other (two prompts that
cache-dit publishes). So the picture is not pixel for pixel the eager one.
"""


def _cached(*caches: Pass) -> tuple[Pass, ...]:
    """Return `faithful` with caches."""
    return (*faithful[:-1], *caches, faithful[-1])


_GUARD = 0.25
"""The distance from which the presets compute a step after all.

On one Kontext edit that cache-dit publishes, all hits were below 0.12 and 0.15.
"""
_SKIPPED = {
    "balanced": {
        28: (8, 9, 11, 12, 14, 15, 17, 18, 20, 21, 23, 25),
        20: (6, 7, 9, 10, 12, 13, 15, 17),
        50: (15, 16, 18, 19, 21, 22, 24, 25, 27, 28, 30, 32, 33, 35, 36, 38, 39, 41, 42, 44, 45),
    },
    "fast": {
        28: (6, 7, 9, 10, 12, 13, 15, 16, 18, 19, 21, 22, 24, 25),
        20: (5, 6, 8, 10, 11, 13, 14, 16, 17),
        50: (
            11, 12, 14, 15, 17, 18, 20, 21, 23, 24, 26, 27, 29, 30, 32, 33, 35, 36, 38, 39, 41, 42,
            44, 45,
        ),
    },
}  # fmt: skip
"""The steps to skip, from statistics of the real Kontext that others published.

`benchmarks/kontext_schedule.py` makes them; no real edit was made to confirm them.
"""


def _schedules(preset: str) -> list[Schedule]:
    return [Schedule(n, dict.fromkeys(steps, _GUARD)) for n, steps in _SKIPPED[preset].items()]


balanced: tuple[Pass, ...] = _cached(
    FirstBlockCache(
        0.12, warmup_steps=8, tail_steps=2, of_steps=28, max_consecutive_hits=2,
        schedule=_schedules("balanced"),
    )
)  # fmt: skip
"""Lossy: skips up to 12 of 28 steps, so it computes 16 or more.

At 28, 20 and 50 steps a schedule says which, and skips none whose first block's output changed by
more than a quarter. At other lengths the threshold decides. Either way it computes the first 8 and
the last 2 of 28 steps, and skips at most 2 in a row.

Measured on an H100, random weights, with all 12 skipped: 2.31 times as fast as eager. That is the
work of 16.2 steps. `faithful` with 17 steps is 2.21 times as fast.

Measured on Spark, the small model in the package, on 256 edits: 48.8 dB to the pictures of all
steps, 32.1 at worst. Plain with 17 steps, as much work: 42.5, 19.6 at worst; the difference is 6.3
[5.8, 6.9] dB. In 19 edits plain is nearer, once by 15 dB.

Evidence from the real model, by others: cache-dit's F1B0 at these limits, holding the last value
where this extends a damped line, computed 16 of 28 steps of one FLUX.1 Kontext edit and kept 38.2
dB to the plain picture, 28.5 dB inside the edited region (our measurement on their published
pictures). Plain with about 16 steps kept 26.2 dB on average over the 1026 edits of KontextBench
(RegionE, arXiv:2510.25590). We measured no quality on the real model: compare on your own pictures
with `fluxfire bench`, where plain with as many steps stands beside it.
"""

fast: tuple[Pass, ...] = _cached(
    FirstBlockCache(
        0.15, warmup_steps=6, tail_steps=2, of_steps=28, max_consecutive_hits=2,
        schedule=_schedules("fast"),
    )
)  # fmt: skip
"""Lossy, more so than `balanced`: skips up to 14 of 28 steps, so it computes 14 or more.

A schedule and a threshold as in `balanced`, with the first 6 and the last 2 of 28 steps computed,
and at most 2 skipped in a row.

Measured on an H100, random weights, with all 14 skipped: 2.60 times as fast as eager. That is the
work of 14.2 steps. `faithful` with 15 steps is 2.49 times as fast.

Measured on Spark on 256 edits: 46.6 dB to the pictures of all steps, 24.5 at worst. Plain with 16
steps, as much work there: 41.1, 19.3 at worst; the difference is 5.5 [5.0, 6.1] dB. In 18 edits
plain is nearer, once by 13 dB. `fluxfire calibrate` found better steps for Spark: with 14 computed
47.8 dB, 28.1 at worst.

Evidence from the real model, by others: cache-dit's F1B0 at 0.15 with 2 warm-up steps and at most 2
hits in a row computed 13 of 28 steps of one FLUX.1 Kontext edit and kept 32.5 dB to the plain
picture, 23.7 dB inside the edited region (our measurement on their published pictures). TeaCache
with about 11 of 28 steps kept 28.3 dB on average over the 1026 edits of KontextBench (RegionE,
arXiv:2510.25590). We measured no quality on the real model.
"""

article: tuple[Pass, ...] = (
    InductorPatch(),
    QKVFusion(),
    MemoryLayout(),
    FirstBlockCache(0.12, warmup_steps=0, tail_steps=0, max_consecutive_hits=None),
    MegaCache(),
    Compile(
        vae=True,
        mode="max-autotune-no-cudagraphs",
        dynamic=True,
        options={
            "conv_1x1_as_mm": True,
            "coordinate_descent_tuning": True,
            "coordinate_descent_check_all_directions": True,
            "shape_padding": True,
            "epilogue_fusion": False,
        },
    ),
)
"""The settings of the article that fluxfire began with ("FLUX.1-Kontext: When Speed Meets Style").

The order is that of fluxfire's stages. The article compiles the whole transformer, in which no
cache can decide, so this preset compiles the blocks. We keep it as a record and do not recommend
it.

Lossy: its cache has no warm-up steps and no limit on hits in a row. At this threshold pictures of
FLUX.1-dev that para-attn and cache-dit publish have 19 to 22 dB to the plain ones. The first
`warmup` takes minutes for autotuning, and saves the compiled code in the user's cache folder.
"""

PresetName = Literal["faithful", "balanced", "fast", "article"]
NAMES: tuple[PresetName, ...] = get_args(PresetName)


def named(name: str) -> tuple[Pass, ...]:
    """Return a preset by name.

    Raises:
        PlanError: there is no such preset.
    """
    if name not in NAMES:
        raise PlanError(
            f"there is no preset {name!r}; there are {', '.join(NAMES)}{did_you_mean(name, NAMES)}"
        )
    preset: tuple[Pass, ...] = globals()[name]
    return preset
