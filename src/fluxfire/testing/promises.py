"""Shared helpers of the checks: a small edit, comparisons, and the error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image as Pictures

from fluxfire.diffusers_types import DiffusersPipeline, Pipeline
from fluxfire.kontext import KONTEXT
from fluxfire.protocol import Pass
from fluxfire.testing.fingerprints import differences, fingerprint

Image = npt.NDArray[np.float32]
MakePipe = Callable[[], DiffusersPipeline]
RunEdit = Callable[..., Image]

SIZE, OTHER_SIZE = (32, 32), (48, 32)
ROUNDING = 1e-4
"""Largest difference of a `"close"` picture in [0, 1] between two graphs."""


class ConformanceError(AssertionError):
    """A pass breaks a promise; the message says which one, and where to look."""


class InjectedFailureError(Exception):
    """`check_pass` raises this on purpose, in the middle of an operation."""


def edit(
    pipe: DiffusersPipeline, size: tuple[int, int] = SIZE, *, steps: int = 3, **call: Any
) -> Image:
    """Edit a small fixed picture.

    Args:
        pipe: a tiny Kontext pipeline, editing or inpainting.
        size: (width, height) of the result and of the reference.
        steps: denoising steps.
        **call: additional arguments of the pipeline.

    Returns:
        (1, height, width, 3), float32 in [0, 1].
    """
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture = Pictures.fromarray(pixels)
    arguments: dict[str, Any] = {
        "image": picture,
        "prompt": "make it night",
        **KONTEXT.exact_size(width, height),
        "num_inference_steps": steps,
        "max_sequence_length": 24,
        "generator": torch.Generator().manual_seed(1),
        "output_type": "np",
        "_auto_resize": False,
    }
    if hasattr(pipe, "mask_processor"):
        mask = Pictures.new("L", size)
        mask.paste(255, (0, 0, width // 2, height))
        arguments |= {"mask_image": mask, "image_reference": picture}
    result: Image = pipe(**(arguments | call)).images
    return result


def fail(pass_: Pass, promise: str, detail: str, cause: BaseException | None = None) -> NoReturn:
    """Raise the error that a pass breaks a promise."""
    name = getattr(pass_, "name", repr(pass_))
    raise ConformanceError(f"{name} breaks a promise: {promise}. {detail}") from cause


def check_same_structure(pass_: Pass, promise: str, before: dict[str, Any], pipe: Pipeline) -> None:
    """Fail if a pipeline's structure has changed."""
    changed = differences(before, fingerprint(pipe))
    if changed:
        shown = "\n  ".join(changed[:10])
        hint = "change the pipeline through the transaction alone"
        differ = "1 thing differs" if len(changed) == 1 else f"{len(changed)} things differ"
        fail(pass_, promise, f"{differ} ({hint}):\n  {shown}")


def max_difference(one: Image, other: Image) -> float:
    """Return the largest absolute difference between two pictures' pixels."""
    return float(np.abs(one - other).max())
