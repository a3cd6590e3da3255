"""How much pictures may change: stated by the user, of the worst example or on average."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from statistics import mean

from fluxfire.bench.quality import EQUAL, Likeness, Quality, missing
from fluxfire.errors import BenchError
from fluxfire.text import extra_hint

_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What must hold beside the plain pipeline's pictures; None asks for nothing.

    Attributes:
        min_psnr: dB that the worst picture must reach.
        mean_psnr: dB that the pictures must reach on average.
        min_ssim: SSIM that the worst picture must reach.
        max_flip: FLIP that the worst picture must not exceed.
        max_lost: by how much the share of right edits may fall below the plain pipeline's,
            where a program can tell: 0.01 is one point. Edits that are right only with the
            passes make up for others.

    Raises:
        BenchError: when made: nothing is asked for, or something that cannot be.
    """

    min_psnr: float | None = None
    mean_psnr: float | None = None
    min_ssim: float | None = None
    max_flip: float | None = None
    max_lost: float | None = None

    def __post_init__(self) -> None:
        ranges = {"min_psnr": EQUAL, "mean_psnr": EQUAL}
        if not self.asked:
            names = ", ".join(f.name for f in fields(self))
            raise BenchError(f"the budget asks for nothing; give at least one of {names}")
        for name, value in self.asked.items():
            if not isinstance(value, float | int) or not 0 <= value <= ranges.get(name, 1.0):
                raise BenchError(
                    f"{name}={value!r} can never be met; it must lie between 0 and "
                    f"{ranges.get(name, 1.0):g}"
                )

    def check_measurable(self, *, checked: bool) -> None:
        """Refuse what cannot be measured here.

        Args:
            checked: whether a program can tell if the examples' edits are right.

        Raises:
            BenchError: naming what is missing.
        """
        if absent := [name for name in missing() if name.lower() in self.measures]:
            raise BenchError(f"the budget asks for {' and '.join(absent)}; {extra_hint('bench')}")
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

    @property
    def asked(self) -> dict[str, float]:
        """The limits that were stated, by name."""
        return {name: v for name, v in asdict(self).items() if v is not None}

    @property
    def measures(self) -> tuple[str, ...]:
        """Which measures it asks for beside PSNR."""
        measured = {"min_ssim": "ssim", "max_flip": "flip"}
        return tuple(measured[name] for name in self.asked if name in measured)

    def fallen(self, quality: Quality, plain_success: float | None) -> str | None:
        """Say what all pictures together fall short of, or None.

        Args:
            quality: of all pictures.
            plain_success: share of the plain ones that are right.
        """
        average = mean(one.psnr for one in quality.likenesses)
        if self.mean_psnr is not None and average < self.mean_psnr:
            return f"PSNR {average:.1f} dB on average"
        if self.max_lost is None or quality.success is None or plain_success is None:
            return None
        lost = plain_success - quality.success
        return f"{lost * 100:.1f} points fewer right" if lost > self.max_lost + _ROUNDING else None

    def __str__(self) -> str:
        said = {
            "min_psnr": "worst PSNR at least {} dB",
            "mean_psnr": "mean PSNR at least {} dB",
            "min_ssim": "worst SSIM at least {}",
            "max_flip": "worst FLIP at most {}",
            "max_lost": "edits right at most {} points fewer",
        }
        return ", ".join(
            said[name].format(f"{v * 100 if name == 'max_lost' else v:g}")
            for name, v in self.asked.items()
        )
