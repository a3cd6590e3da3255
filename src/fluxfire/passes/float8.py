"""Float8: the blocks' matrix products in float8."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fluxfire.kernels.float8 import (
    E4M3,
    QuantizedRows,
    float8_linear,
    quantize_rows,
    quantize_weight,
)
from fluxfire.passes.shared import eight_bits
from fluxfire.passes.shared.eight_bits import Format, Input, Originals, check_originals
from fluxfire.protocol import Change, Exactness, Finding, Stage, Target, Trait
from fluxfire.runtime.transaction import Transaction

_MIN_CAPABILITY = (8, 9)


@dataclass(frozen=True)
class Float8:
    """Computes the blocks' matrix products (projections, outputs and MLPs) in float8 (e4m3).

    Weights are quantized once, with one scale per output channel. Activations are quantized at
    every call, with one scale per token. Query, key and value are one product. Small or sensitive
    parts are not quantized: everything outside the blocks (embeddings, output), the modulations,
    the norms and attention itself. Behind `FusedBlocks` the kernel that computes a product's input
    also quantizes it.

    Measured on an H100 (docs, "Passes"): a step of `faithful` 274 → 200 ms, and the edit's peak of
    memory 33.5 → 25.5 GiB. The docs ("How close is a step to the hardware limit?") compare it with
    torchao's float8, and with `Attention("fa3-fp8")`.

    Others report LPIPS 0.02 to 0.09 for eight bits on FLUX.1-dev and FLUX.2, and 0.123 for plain
    Kontext with about 16 of 28 steps (docs, "What others measured on the real model"). Nobody
    published figures for this quantization on Kontext, and we have not measured it on the real
    model. So it is in no preset. Plain with 21 steps takes as long on an H100. On 256 edits by
    Spark it keeps 46.5 dB to the pictures of 28 steps (worst 19.5), and `Float8` 37.4 (worst 16.8).

    Needs compute capability 8.9 (H100, RTX 40) or higher on a GPU; `Int8` needs no such GPU.

    A LoRA costs nothing: the pass quantizes `weight + scaling · B · A`, summed in float32. Load,
    scale, exchange, fuse or unload it at any time; the pass quantizes again before the next step.
    PEFT's layers keep the adapters and the original weights. DoRA, LoKr and other adapters cannot
    be folded: a layer that has one is not quantized. If you load one later, the next step raises an
    error with the layer's name. With `originals="drop"` that goes for every LoRA, since its sum
    needs the original weight.

    The pass does not quantize layers with a hook. A later hook raises an error if the fused
    products would not call it. If weights change (a state dict is loaded, a step callback writes to
    them), the pass quantizes them again before the next step. Gradients are those of the product
    without rounding. A CPU emulates the arithmetic, which is slow and only useful to judge quality.

    Attributes:
        originals: `"host"` keeps the original weights in host memory; `restore` brings them back
            bit for bit, and `save_pretrained` works. `"drop"` frees them. Then `restore` raises an
            error, and so does everything else that needs them: saving, copying, fusing a LoRA.

    Raises:
        ValueError: `originals` is neither `"host"` nor `"drop"`.
    """

    originals: Originals = "host"
    _: KW_ONLY

    name: ClassVar[str] = "float8"
    stage: ClassVar[Stage] = "weights"
    slot: ClassVar[str | None] = "quantization"
    exactness: ClassVar[Exactness] = "lossy"
    provides: ClassVar[frozenset[Trait]] = frozenset({"quantized"})

    def __post_init__(self) -> None:
        check_originals(self.originals)

    def check(self, target: Target) -> Iterator[Finding]:
        """Refuse devices without float8, and weights that are fused, offloaded or quantized."""
        environment = target.environment
        if not target.on_gpu:
            yield Finding(
                "warning",
                "float8 is emulated without a GPU: slow, and only useful to judge quality",
            )
        elif environment.capability is not None and environment.capability < _MIN_CAPABILITY:
            capability = ".".join(map(str, environment.capability))
            yield Finding(
                "error",
                f"{environment.gpu} has compute capability {capability}, "
                f"and float8 products need 8.9",
                "use Int8() in its place",
            )
        yield from eight_bits.check(target, type(self).__name__, self.originals)

    def apply(self, tx: Transaction) -> Change:
        """Quantize layer by layer, so that at most one layer is in memory twice."""
        return eight_bits.install(tx, FLOAT8, type(self).__name__, self.originals)


def _multiply(
    x: Input, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Round the input's rows, unless they are, and multiply."""
    rows = x if isinstance(x, QuantizedRows) else QuantizedRows(*quantize_rows(x))
    return float8_linear(rows, weight, scale, bias, dtype)


FLOAT8 = Format(E4M3, quantize_weight, _multiply, takes_float8=True)
