"""How much a picture may change: stated by the user, judged by the worst example."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from fluxfire.bench.quality import Likeness, Quality, missing
from fluxfire.errors import BenchError

_MOST_PSNR = 100.0  # what equal pictures are told as


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What must hold beside the plain pipeline's pictures; None asks for nothing.

    Attributes:
        min_psnr: dB that the worst picture must reach.
        min_ssim: SSIM that the worst picture must reach.
        max_flip: FLIP that the worst picture must not exceed.
        max_lost: by how much the share of right edits may fall below the plain pipeline's,
            where a program can tell: 0.01 is one point.

    Raises:
        BenchError: when made: nothing is asked for, or something that cannot be.
    """

    min_psnr: float | None = None
    min_ssim: float | None = None
    max_flip: float | None = None
    max_lost: float | None = None

    def __post_init__(self) -> None:
        ranges = {"min_psnr": _MOST_PSNR, "min_ssim": 1.0, "max_flip": 1.0, "max_lost": 1.0}
        asked = {name: v for name, v in asdict(self).items() if v is not None}
        if not asked:
            names = ", ".join(f.name for f in fields(self))
            raise BenchError(f"the budget asks for nothing; give at least one of {names}")
        for name, value in asked.items():
            if not isinstance(value, float | int) or not 0 <= value <= ranges[name]:
                raise BenchError(
                    f"{name}={value!r} can never be met; it must lie between 0 and {ranges[name]:g}"
                )

    def check_measurable(self, *, checked: bool) -> None:
        """Refuse what cannot be measured here.

        Args:
            checked: whether a program can tell if the examples' edits are right.

        Raises:
            BenchError: naming what is missing.
        """
        needs = {"SSIM": self.min_ssim, "FLIP": self.max_flip}
        if absent := [name for name in missing() if needs[name] is not None]:
            raise BenchError(
                f'the budget asks for {" and ".join(absent)}; pip install "fluxfire[bench]"'
            )
        if self.max_lost is not None and not checked:
            raise BenchError(
                "the budget asks how many edits stay right (max_lost), and no program can tell "
                "that of these examples; ask for min_psnr, or use Spark's held-out edits"
            )

    def broken(self, one: Likeness) -> str | None:
        """Say what a single picture exceeds, or None: one is enough."""
        if self.min_psnr is not None and one.psnr < self.min_psnr:
            return f"PSNR {one.psnr:.1f} dB"
        if self.min_ssim is not None and (one.ssim or 0.0) < self.min_ssim:
            return f"SSIM {one.ssim or 0.0:.4f}"
        if self.max_flip is not None and (1.0 if one.flip is None else one.flip) > self.max_flip:
            return f"FLIP {1.0 if one.flip is None else one.flip:.4f}"
        return None

    def exceeded(self, quality: Quality, plain_success: float | None) -> str | None:
        """Say what pictures exceed as a whole, or None.

        Args:
            quality: of all, beside the plain ones.
            plain_success: share of the plain ones that are right.
        """
        for one in quality.likenesses:
            if (why := self.broken(one)) is not None:
                return why
        if self.max_lost is not None and quality.success is not None and plain_success is not None:
            lost = plain_success - quality.success
            if lost > self.max_lost + 1e-9:
                return f"{lost * 100:.1f} points fewer edits right"
        return None

    def __str__(self) -> str:
        said = {
            "min_psnr": "worst PSNR at least {} dB",
            "min_ssim": "worst SSIM at least {}",
            "max_flip": "worst FLIP at most {}",
            "max_lost": "at most {} of the edits lost",
        }
        asked = {name: v for name, v in asdict(self).items() if v is not None}
        return ", ".join(said[name].format(f"{v:g}") for name, v in asked.items())
