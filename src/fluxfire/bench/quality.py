"""Image similarity: PSNR of the whole picture and of the edited region; SSIM, FLIP if installed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from statistics import mean
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from fluxfire.bench.intervals import Interval, bootstrap, share_interval
from fluxfire.spark import checking
from fluxfire.spark.scoring import psnr

EQUAL = 100.0
"""The PSNR of equal pictures in dB, which is the highest value."""
_PATCH = 8  # pixels of a side
_CHANGED = 0.05  # of a range of 1; encoding and decoding changes a patch by about 0.02


@dataclass(frozen=True)
class Similarity:
    """One picture compared with its reference.

    Attributes:
        psnr: peak signal-to-noise ratio in dB; 100 for equal pictures, higher is better.
        ssim: structural similarity (Wang et al., 2004, Gaussian weights) over the three
            channels, at most 1, higher is better; None without scikit-image.
        flip: mean FLIP error (Andersson et al., 2020) at 67 pixels a degree, 0 to 1, lower is
            better: the difference that a viewer sees when flipping between the two pictures. None
            without flip-evaluator.
        edited: PSNR in dB inside the edited region, where damage is most visible: a small edit
            leaves most pixels unchanged, which raises the PSNR of the whole picture. None without
            a source picture, or if the edit changes nothing.
    """

    psnr: float
    ssim: float | None = None
    flip: float | None = None
    edited: float | None = None


@dataclass(frozen=True)
class Quality:
    """Pictures compared with their references.

    Attributes:
        similarities: one for each pair, in order; at least one.
        right: for each picture, whether the edit is correct; None if no program can check it.
    """

    similarities: tuple[Similarity, ...]
    right: tuple[bool | None, ...]

    @property
    def worst(self) -> int:
        """Position of the pair with the lowest PSNR."""
        return min(range(len(self.similarities)), key=lambda i: self.similarities[i].psnr)

    @property
    def worst_psnr(self) -> float:
        """The lowest PSNR, in dB."""
        return self.similarities[self.worst].psnr

    @property
    def success(self) -> float | None:
        """Share of correct edits among the pictures that a program can check."""
        known = [right for right in self.right if right is not None]
        return mean(known) if known else None

    def minus(self, other: Quality, measure: str = "psnr") -> Interval | None:
        """Return the mean difference of a measure from another quality, with its paired interval.

        Args:
            other: the quality of the same examples, in the same order.
            measure: `"psnr"` or `"edited"`, in dB.

        Returns:
            The interval; None if fewer than two examples have the measure.
        """
        pairs = zip(self.similarities, other.similarities, strict=True)
        values = ((getattr(one, measure), getattr(two, measure)) for one, two in pairs)
        return bootstrap([a - b for a, b in values if a is not None and b is not None])

    def to_dict(self) -> dict[str, Any]:
        """Return the mean, interval and worst value of each measure, and all values."""
        right = share_interval([one for one in self.right if one is not None])
        return {
            "n": len(self.similarities),
            **{name: self._summary(name, of) for name, of in _WORST.items()},
            "success": self.success,
            "success_interval": list(right) if right else None,
            "worst": self.worst,
            "each": [
                {**asdict(one), "right": right}
                for one, right in zip(self.similarities, self.right, strict=True)
            ],
        }

    def _summary(
        self, name: str, worst_of: Callable[[list[float]], float]
    ) -> dict[str, Any] | None:
        """Summarize a measure over the pairs that have it; some pairs have no `edited`."""
        values = [v for one in self.similarities if (v := getattr(one, name)) is not None]
        if not values:
            return None
        interval = _ends(bootstrap(values))
        return {"mean": mean(values), "worst": worst_of(values), "interval": interval}


def _ends(interval: Interval | None) -> list[float] | None:
    return [interval.low, interval.high] if interval else None


SAME = Similarity(EQUAL, 1.0, 0.0, EQUAL)
"""The similarity of a picture to itself."""
_WORST: dict[str, Callable[[list[float]], float]] = {
    "psnr": min,
    "ssim": min,
    "flip": max,
    "edited": min,
}


def compare(
    made: Sequence[Image.Image],
    wanted: Sequence[Image.Image],
    right: Sequence[bool | None] | None = None,
    sources: Sequence[Image.Image | None] | None = None,
) -> Quality:
    """Compare pictures pair by pair.

    Args:
        made: the pictures to compare.
        wanted: their references, of the same sizes.
        right: for each picture, whether the edit is correct; None if unknown.
        sources: the unedited pictures, of any size, to find the edited regions.

    Raises:
        ValueError: there are no pictures, or their numbers or sizes differ.
    """
    if not made or len(made) != len(wanted):
        raise ValueError(f"{len(made)} pictures cannot be compared with {len(wanted)}")
    before = sources if sources is not None else [None] * len(made)
    similarities = tuple(
        similarity(a, b, source=source) for a, b, source in zip(made, wanted, before, strict=True)
    )
    return Quality(similarities, tuple(right) if right is not None else (None,) * len(made))


def similarity(
    made: Image.Image,
    wanted: Image.Image,
    measures: Collection[str] = ("ssim", "flip"),
    source: Image.Image | None = None,
) -> Similarity:
    """Compare two pictures of one size.

    Args:
        made: the picture to compare.
        wanted: its reference.
        measures: measures other than PSNR; FLIP takes over a second for a megapixel.
        source: the unedited picture, of any size, for the PSNR inside the edited region.

    Raises:
        ValueError: the pictures have different sizes.
    """
    if made.size != wanted.size:
        raise ValueError(f"a picture of {made.size} cannot be compared with one of {wanted.size}")
    near = psnr(checking.as_tensor(made), checking.as_tensor(wanted))
    return Similarity(
        near,
        _ssim(made, wanted) if "ssim" in measures else None,
        _flip(made, wanted) if "flip" in measures else None,
        None if source is None else _inside(made, wanted, edited_region(source, wanted)),
    )


def edited_region(source: Image.Image, result: Image.Image) -> npt.NDArray[np.bool_]:
    """Return where an edit changed its picture.

    A patch of 8 x 8 pixels belongs to the edit if its mean absolute difference from the source,
    over pixels and channels, is above 0.05 of a range of 1. The eight patches around it belong to
    the edit too, so that an edge that moved by a few pixels counts.

    Args:
        source: the unedited picture, which is resized to the result's size.
        result: the edited picture.

    Returns:
        (height, width) booleans.
    """
    if source.size != result.size:
        source = source.resize(result.size, Image.Resampling.LANCZOS)
    changed = np.abs(_pixels(result) - _pixels(source)).mean(axis=2)
    height, width = changed.shape
    padded = np.pad(changed, [(0, -height % _PATCH), (0, -width % _PATCH)], mode="edge")
    rows, columns = (side // _PATCH for side in padded.shape)
    patches = padded.reshape(rows, _PATCH, columns, _PATCH).mean(axis=(1, 3)) > _CHANGED
    around = np.pad(patches, 1)
    grown = np.zeros_like(patches)
    for down in range(3):
        for right in range(3):
            grown |= around[down : down + rows, right : right + columns]
    region: npt.NDArray[np.bool_] = grown.repeat(_PATCH, axis=0).repeat(_PATCH, axis=1)
    return region[:height, :width]


def _inside(made: Image.Image, wanted: Image.Image, region: npt.NDArray[np.bool_]) -> float | None:
    """Return the PSNR over a region, (height, width) booleans; None if it is empty."""
    if not region.any():
        return None
    difference = (_pixels(made) - _pixels(wanted))[region].astype(np.float64)
    error = max(float(np.square(difference).mean()), 10 ** (-EQUAL / 10))
    return float(-10 * np.log10(error))


def missing() -> list[str]:
    """Return the names of measures that are not installed; `fluxfire[bench]` installs them."""
    return [name for name, package in _PACKAGES.items() if find_spec(package) is None]


_PACKAGES = {"SSIM": "skimage", "FLIP": "flip_evaluator"}
_SSIM_SIDE = 11  # the Gaussian window of Wang et al.: sigma 1.5, cut at 3.5 sigma


def _ssim(made: Image.Image, wanted: Image.Image) -> float | None:
    if find_spec("skimage") is None or min(made.size) < _SSIM_SIDE:
        return None
    from skimage.metrics import structural_similarity

    value: float = structural_similarity(
        _pixels(wanted),
        _pixels(made),
        data_range=1.0,
        channel_axis=-1,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    return float(value)


def _flip(made: Image.Image, wanted: Image.Image) -> float | None:
    if find_spec("flip_evaluator") is None:
        return None
    import flip_evaluator

    _, error, _ = flip_evaluator.evaluate(_pixels(wanted), _pixels(made), "LDR", applyMagma=False)
    return float(error)


def _pixels(picture: Image.Image) -> npt.NDArray[Any]:
    """Return (height, width, 3) float32 in [0, 1]."""
    return np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
