"""Int8: the blocks' matrix products in int8."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from fluxfire.kernels.int8 import int8_linear, int8_weight_linear, quantize_int8
from fluxfire.passes.shared import eight_bits
from fluxfire.passes.shared.eight_bits import Format, Input, Originals, check_originals
from fluxfire.protocol import Change, Exactness, Finding, Stage, Target, Trait
from fluxfire.runtime.transaction import Transaction

Activations = Literal["int8", "plain"]
_ACTIVATIONS: tuple[Activations, ...] = get_args(Activations)
_MIN_CAPABILITY = (7, 5)


@dataclass(frozen=True)
class Int8:
    """Computes the blocks' matrix products (projections, outputs and MLPs) in int8.

    It is `Float8` with other numbers: one scale for each output channel of a weight and for each
    token of an input, the same layers, the same rules for LoRA, changed weights and gradients. Int8
    rounds a weight by 0.8% where float8 rounds by 2.6%, and the picture shows it. On 32 edits by
    Spark, in float32 on a CPU, `Int8` keeps 45.4 dB [42.4, 47.8] to the plain pictures (worst
    16.5), `Float8` 34.1 [30.9, 36.8] (worst 4.5), and plain with 21 of 28 steps 47.0 [45.0, 48.8]
    (worst 30.9). So use it to save memory. To save time, fewer steps change a picture less.

    Others report LPIPS 0.09 for int8 weights and activations on FLUX.1-dev (docs, "What others
    measured on the real model"). A large model has single channels of activations that are much
    larger than the others. They make an int8 scale coarse for the whole token.
    `activations="plain"` does not round activations: it casts each weight to the plain dtype before
    the product.

    Any NVIDIA GPU since the RTX 20 multiplies int8 numbers. The speed: Not measured yet.

    Attributes:
        originals: as for `Float8`: `"host"` keeps the original weights in host memory, `"drop"`
            frees them.
        activations: `"int8"` rounds the products' inputs, too; `"plain"` does not, which saves as
            much memory, and no time.

    Raises:
        ValueError: `originals` or `activations` is none of these.
    """

    originals: Originals = "host"
    _: KW_ONLY
    activations: Activations = "int8"

    name: ClassVar[str] = "int8"
    stage: ClassVar[Stage] = "weights"
    slot: ClassVar[str | None] = "quantization"
    exactness: ClassVar[Exactness] = "lossy"
    provides: ClassVar[frozenset[Trait]] = frozenset({"quantized"})

    def __post_init__(self) -> None:
        check_originals(self.originals)
        if self.activations not in _ACTIVATIONS:
            raise ValueError(
                f"activations={self.activations!r}; it must be one of {', '.join(_ACTIVATIONS)}"
            )

    def check(self, target: Target) -> Iterator[Finding]:
        """Refuse devices without int8, and weights that are fused, offloaded or quantized."""
        environment = target.environment
        rounds = self.activations == "int8"
        if not target.on_gpu and rounds:
            yield Finding(
                "warning",
                "int8 is emulated without a GPU: slow, and only useful to judge quality",
            )
        elif rounds and (environment.capability or _MIN_CAPABILITY) < _MIN_CAPABILITY:
            capability = ".".join(map(str, environment.capability or ()))
            yield Finding(
                "error",
                f"{environment.gpu} has compute capability {capability}, and int8 products need "
                f"7.5",
                "use activations='plain'",
                Int8(self.originals, activations="plain"),
            )
        yield from eight_bits.check(target, type(self).__name__, self.originals)

    def apply(self, tx: Transaction) -> Change:
        """Quantize layer by layer, so that at most one layer is in memory twice."""
        format_ = INT8 if self.activations == "int8" else INT8_WEIGHTS
        return eight_bits.install(tx, format_, type(self).__name__, self.originals)


def _multiply(
    x: Input, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    assert isinstance(x, Tensor)  # noqa: S101 - the formats take no float8 rows
    return int8_linear(x, weight, scale, bias, dtype)


def _multiply_weights(
    x: Input, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    assert isinstance(x, Tensor)  # noqa: S101 - as above
    return int8_weight_linear(x, weight, scale, bias).to(dtype)


INT8 = Format(torch.int8, quantize_int8, _multiply)
INT8_WEIGHTS = Format(torch.int8, quantize_int8, _multiply_weights)
