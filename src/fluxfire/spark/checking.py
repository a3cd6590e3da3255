"""Checks an edit: compares a picture with the exact target.

A picture passes if a viewer could not tell it from the target. The check tolerates edges that are
two pixels off (at 128 pixels), faint noise, and slight blur. The tolerances were set on controls,
which a test repeats: targets and VAE round trips must pass; unedited references, targets of other
edits, and misplaced, ghosted or blurred targets must fail.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fluxfire.spark.rendering import blur

BLEMISH = 0.07
"""Largest allowed error of any window, the mean over its pixels and channels, in [0, 1]."""
SHARPNESS = (0.45, 2.0)
"""Allowed gradient energy around edges, as a fraction of the target's."""
_WINDOW, _FORGIVEN, _SOFTEN = 6, 2, 1.0  # pixels if the shorter side has 128
_SIDE = 128
_EDGE, _FAINT = 0.08, 0.05  # smallest gradient of an edge; an energy that is negligible


@dataclass(frozen=True)
class Verdict:
    """The measurements of the checker.

    Attributes:
        blemish: error of the worst window; edges may be two pixels off.
        sharpness: gradient energy around edges, relative to the target's.
    """

    blemish: float
    sharpness: float

    @property
    def passed(self) -> bool:
        """Whether both values are within the tolerances."""
        low, high = SHARPNESS
        return self.blemish <= BLEMISH and low <= self.sharpness <= high


def as_tensor(image: Any) -> Tensor:
    """Return a picture as (3, height, width) float32 in [0, 1].

    Args:
        image: a PIL image; or an array of (height, width, 3), uint8 or floats in [0, 1]; or
            a tensor of (3, height, width) floats in [0, 1].

    Raises:
        ValueError: the image has another type or shape.
    """
    if isinstance(image, Tensor):
        picture = image.detach().float().cpu()
    else:
        array = np.array(image.convert("RGB") if hasattr(image, "convert") else image)
        scale = 255 if array.dtype == np.uint8 else 1
        picture = torch.from_numpy(array).float().div(scale)
        picture = picture.movedim(-1, 0) if picture.ndim == 3 else picture  # noqa: PLR2004
    if picture.ndim != 3 or picture.shape[0] != 3:  # noqa: PLR2004
        raise ValueError(f"not an RGB picture: its shape is {tuple(picture.shape)}")
    return picture


def judge(image: Tensor, target: Tensor) -> Verdict:
    """Compare a picture with its target, both (3, height, width) in [0, 1]."""
    scale = min(target.shape[1:]) / _SIDE
    pair = torch.stack([image, target])
    soft_image, soft_target = blur(pair, _SOFTEN * scale)
    reach = round(_FORGIVEN * scale)
    error = _forgiving(soft_image, soft_target, reach)
    window = max(2, round(_WINDOW * scale))
    worst = functional.avg_pool2d(error[None, None], window, stride=1).max()
    energy_image, energy_target = _energy(blur(pair, _SOFTEN * scale / 2))
    near_edges = functional.max_pool2d(
        (torch.maximum(energy_image, energy_target) > _EDGE**2).float()[None, None],
        2 * reach + 3,
        1,
        reach + 1,
    )[0, 0]
    found, wanted = ((e * near_edges).sum() + _FAINT for e in (energy_image, energy_target))
    return Verdict(float(worst), float(found / wanted))


def _forgiving(image: Tensor, target: Tensor, reach: int) -> Tensor:
    """Return each pixel's error to the most similar target pixel within reach: (H, W)."""
    height, width = target.shape[1:]
    around = functional.pad(target[None], [reach] * 4, mode="replicate")[0]
    error = torch.full((height, width), torch.inf)
    for dy in range(2 * reach + 1):
        for dx in range(2 * reach + 1):
            moved = around[:, dy : dy + height, dx : dx + width]
            error = torch.minimum(error, (image - moved).square().mean(0))
    return error.sqrt()


def _energy(pictures: Tensor) -> Tensor:
    """Return squared gradients summed over channels: (N, H, W)."""
    padded = functional.pad(pictures, (0, 1, 0, 1), mode="replicate")
    dx = padded[:, :, :-1, 1:] - pictures
    dy = padded[:, :, 1:, :-1] - pictures
    return (dx**2 + dy**2).sum(1)
