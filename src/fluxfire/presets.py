"""Named lists of passes: plain tuples, to slice and extend."""

from __future__ import annotations

from fluxfire.errors import PlanError
from fluxfire.passes import Compile, InductorPatch, MemoryLayout, QKVFusion
from fluxfire.protocol import Pass

faithful: tuple[Pass, ...] = (
    InductorPatch(),
    QKVFusion(),
    Compile(options={"max_autotune_pointwise": True}),
)
"""Nothing lossy: rounding only. What `optimize(pipe)` does."""

article: tuple[Pass, ...] = (
    InductorPatch(),
    QKVFusion(),
    MemoryLayout(),
    Compile(
        region="transformer",
        vae=True,
        mode="max-autotune-no-cudagraphs",
        dynamic=True,
        fullgraph=False,
        options={
            "conv_1x1_as_mm": True,
            "coordinate_descent_tuning": True,
            "coordinate_descent_check_all_directions": True,
            "shape_padding": True,
            "epilogue_fusion": False,
        },
    ),
)
"""The settings of the article that fluxfire began as a re-implementation of ("FLUX.1-Kontext:
When Speed Meets Style"), in the order that fluxfire's stages ask for. Its whole-model autotuning
takes minutes to compile."""

_NAMES = ("faithful", "article")


def named(name: str) -> tuple[Pass, ...]:
    """Return a preset by name.

    Raises:
        PlanError: there is no such preset.
    """
    if name not in _NAMES:
        raise PlanError(f"there is no preset {name!r}; there are {', '.join(_NAMES)}")
    preset: tuple[Pass, ...] = globals()[name]
    return preset
