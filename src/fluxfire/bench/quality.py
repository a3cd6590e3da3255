"""How near a picture is to another: PSNR, and where installed, SSIM and FLIP."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from statistics import mean
from typing import Any

import numpy as np
from PIL import Image

from fluxfire.spark import checking
from fluxfire.spark.scoring import psnr

EQUAL = 100.0
"""The PSNR, in dB, that equal pictures are told to have; none is told to have more."""


@dataclass(frozen=True)
class Likeness:
    """One picture beside the one it should be.

    Attributes:
        psnr: peak signal-to-noise ratio in dB; 100 for equal pictures, higher is nearer.
        ssim: structural similarity (Wang et al., 2004, Gaussian weights) over the three
            channels, at most 1, higher is nearer; None without scikit-image.
        flip: mean FLIP error (Andersson et al., 2020) at 67 pixels a degree, 0 to 1, lower is
            nearer: what somebody sees who flips between the two. None without flip-evaluator.
    """

    psnr: float
    ssim: float | None = None
    flip: float | None = None


@dataclass(frozen=True)
class Quality:
    """Pictures beside those that they should be.

    Attributes:
        likenesses: of each pair, in order; at least one.
        right: for each picture, whether it is right; None where no program can tell.
    """

    likenesses: tuple[Likeness, ...]
    right: tuple[bool | None, ...]

    @property
    def worst(self) -> int:
        """Position of the pair of the lowest PSNR."""
        return min(range(len(self.likenesses)), key=lambda i: self.likenesses[i].psnr)

    @property
    def worst_psnr(self) -> float:
        """The lowest PSNR, in dB."""
        return self.likenesses[self.worst].psnr

    @property
    def success(self) -> float | None:
        """Share of the pictures that are right, of those that can be checked."""
        known = [right for right in self.right if right is not None]
        return mean(known) if known else None

    def to_dict(self) -> dict[str, Any]:
        """Mean and worst of each measure, and every value."""
        return {
            "n": len(self.likenesses),
            **{name: self._told(name, of) for name, of in _WORST.items()},
            "success": self.success,
            "worst": self.worst,
            "each": [
                {**asdict(one), "right": right}
                for one, right in zip(self.likenesses, self.right, strict=True)
            ],
        }

    def _told(self, name: str, worst_of: Any) -> dict[str, float] | None:
        values = [getattr(one, name) for one in self.likenesses]
        if None in values:
            return None
        return {"mean": mean(values), "worst": worst_of(values)}


SAME = Likeness(EQUAL, 1.0, 0.0)
"""A picture beside itself."""
_WORST = {"psnr": min, "ssim": min, "flip": max}


def compare(
    made: Sequence[Image.Image],
    wanted: Sequence[Image.Image],
    right: Sequence[bool | None] | None = None,
) -> Quality:
    """Compare pictures pair by pair.

    Args:
        made: the pictures to judge.
        wanted: those that they should be, of the same sizes.
        right: for each of those made, whether it is right, where that is known.

    Raises:
        ValueError: no pictures, or not as many of one kind as of the other, or of other sizes.
    """
    if not made or len(made) != len(wanted):
        raise ValueError(f"{len(made)} pictures cannot be compared with {len(wanted)}")
    likenesses = tuple(likeness(a, b) for a, b in zip(made, wanted, strict=True))
    return Quality(likenesses, tuple(right) if right is not None else (None,) * len(made))


def likeness(
    made: Image.Image, wanted: Image.Image, measures: Collection[str] = ("ssim", "flip")
) -> Likeness:
    """Compare two pictures of one size.

    Args:
        made: the picture to judge.
        wanted: what it should be.
        measures: which to take beside PSNR; FLIP takes over a second for a megapixel.

    Raises:
        ValueError: they have different sizes.
    """
    if made.size != wanted.size:
        raise ValueError(f"a picture of {made.size} cannot be compared with one of {wanted.size}")
    near = psnr(checking.as_tensor(made), checking.as_tensor(wanted))
    return Likeness(
        near,
        _ssim(made, wanted) if "ssim" in measures else None,
        _flip(made, wanted) if "flip" in measures else None,
    )


def missing() -> list[str]:
    """Name the measures that are not installed; `fluxfire[bench]` brings them."""
    return [name for name, package in _PACKAGES.items() if find_spec(package) is None]


_PACKAGES = {"SSIM": "skimage", "FLIP": "flip_evaluator"}
_SSIM_SIDE = 11  # the Gaussian window of Wang et al.: sigma 1.5, cut at 3.5 sigma


def _ssim(made: Image.Image, wanted: Image.Image) -> float | None:
    if find_spec("skimage") is None or min(made.size) < _SSIM_SIDE:
        return None
    from skimage.metrics import structural_similarity

    value: float = structural_similarity(
        _pixels(wanted), _pixels(made), data_range=1.0, channel_axis=-1, gaussian_weights=True,
        sigma=1.5, use_sample_covariance=False,
    )  # fmt: skip
    return float(value)


def _flip(made: Image.Image, wanted: Image.Image) -> float | None:
    if find_spec("flip_evaluator") is None:
        return None
    import flip_evaluator

    _, error, _ = flip_evaluator.evaluate(_pixels(wanted), _pixels(made), "LDR", applyMagma=False)
    return float(error)


def _pixels(picture: Image.Image) -> Any:
    """Return (height, width, 3) float32 in [0, 1]."""
    return np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
