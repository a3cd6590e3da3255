"""The user's budget: how much pictures may change, in the worst example or on average."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from statistics import mean

from fluxfire.bench.quality import EQUAL, Quality, Similarity, missing
from fluxfire.errors import BenchError
from fluxfire.text import extra_hint

_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits on the difference from the plain pipeline's pictures; None sets no limit.

    Attributes:
        min_psnr: lowest allowed PSNR of any picture, in dB.
        mean_psnr: lowest allowed mean PSNR, in dB.
        min_ssim: lowest allowed SSIM of any picture.
        max_flip: highest allowed FLIP of any picture.
        max_lost: allowed drop of the share of correct edits below the plain pipeline's, as a
            fraction: 0.01 is one percentage point. Needs examples that a program can check. An edit
            that is correct only with the passes makes up for one that is correct only without.

    Raises:
        BenchError: the constructor got no limit, or a limit that is out of range.
    """

    min_psnr: float | None = None
    mean_psnr: float | None = None
    min_ssim: float | None = None
    max_flip: float | None = None
    max_lost: float | None = None

    def __post_init__(self) -> None:
        ranges = {"min_psnr": EQUAL, "mean_psnr": EQUAL}
        if not self.limits:
            names = ", ".join(f.name for f in fields(self))
            raise BenchError(f"the budget has no limit; give at least one of {names}")
        for name, value in self.limits.items():
            if not isinstance(value, float | int) or not 0 <= value <= ranges.get(name, 1.0):
                raise BenchError(
                    f"{name}={value!r} can never be met; it must lie between 0 and "
                    f"{ranges.get(name, 1.0):g}"
                )

    def check_measurable(self, *, checked: bool) -> None:
        """Check that this machine can measure the budget on the examples.

        Args:
            checked: whether a program can check the examples' edits.

        Raises:
            BenchError: it cannot; the message names what is missing.
        """
        if absent := [name for name in missing() if name.lower() in self.measures]:
            raise BenchError(f"the budget asks for {' and '.join(absent)}; {extra_hint('bench')}")
        if self.max_lost is not None and not checked:
            raise BenchError(
                "the budget limits how many edits become wrong (max_lost), but no program can "
                "check these examples; use min_psnr, or Spark's held-out edits"
            )

    def violation(self, one: Similarity) -> str | None:
        """Return a picture's first violation of a limit, in words, or None."""
        if self.min_psnr is not None and one.psnr < self.min_psnr:
            return f"PSNR {one.psnr:.1f} dB"
        if self.min_ssim is not None and (one.ssim or 0.0) < self.min_ssim:
            return f"SSIM {one.ssim or 0.0:.4f}"
        if self.max_flip is not None and (1.0 if one.flip is None else one.flip) > self.max_flip:
            return f"FLIP {1.0 if one.flip is None else one.flip:.4f}"
        return None

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are not None, by name."""
        return {name: v for name, v in asdict(self).items() if v is not None}

    @property
    def measures(self) -> tuple[str, ...]:
        """The required measures other than PSNR."""
        measured = {"min_ssim": "ssim", "max_flip": "flip"}
        return tuple(measured[name] for name in self.limits if name in measured)

    def shortfall(self, quality: Quality, plain_success: float | None) -> str | None:
        """Return the violation of a limit on the mean or on correct edits, in words, or None.

        Args:
            quality: the quality of all pictures.
            plain_success: share of correct edits of the plain pipeline.
        """
        average = mean(one.psnr for one in quality.similarities)
        if self.mean_psnr is not None and average < self.mean_psnr:
            return f"PSNR {average:.1f} dB on average"
        if self.max_lost is None or quality.success is None or plain_success is None:
            return None
        lost = plain_success - quality.success
        return f"{lost * 100:.1f} points fewer right" if lost > self.max_lost + _ROUNDING else None

    def __str__(self) -> str:
        texts = {
            "min_psnr": "worst PSNR at least {} dB",
            "mean_psnr": "mean PSNR at least {} dB",
            "min_ssim": "worst SSIM at least {}",
            "max_flip": "worst FLIP at most {}",
            "max_lost": "edits right at most {} points fewer",
        }
        return ", ".join(
            texts[name].format(f"{v * 100 if name == 'max_lost' else v:g}")
            for name, v in self.limits.items()
        )
