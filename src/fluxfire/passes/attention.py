"""Attention: which kernel the transformer attends with."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from typing_extensions import override

from fluxfire import kontext
from fluxfire.attending import Float8AttnProcessor, bound
from fluxfire.generation import Listener
from fluxfire.protocol import Change, Exactness, Finding, Stage, Target

if TYPE_CHECKING:
    from fluxfire.transaction import Transaction

AUTO, FLOAT8 = "auto", "fa3-fp8"
_CANDIDATES = ("native", "_native_cudnn", "_native_flash", "flash", "_flash_3")
_TOKENS = 8704  # of an edit to 1024 × 1024: 4096, as many of the reference, and 512 of text
_WORTH = 1.01
_CAPABLE = (9, 0)


@dataclass(frozen=True)
class Attention:
    """Chooses the kernel that the transformer attends with, over diffusers' own dispatch.

    Only this transformer's attentions are set; diffusers' `set_attention_backend` also changes
    the choice of every model made later.

    On an H100 (torch 2.11, 8704 tokens, 24 heads of 128) there is little to choose: torch's
    default made 617 TFLOP/s, cuDNN 607, FlashAttention-3 626, and FlashAttention-2 327.

    `"fa3-fp8"` attends in float8 (e4m3) by FlashAttention-3's forward (package `fa3-fwd`). After
    their norm no number of a query or key can exceed a bound that the norm's weights give, so
    their scales are fixed; a value's is measured for each head, at each call. It made
    738 TFLOP/s. Lossy. Behind `FusedBlocks` as without, norm, rotation and the rounding to float8
    are one kernel.

    Attributes:
        backend: `"auto"`, which times those that run here and takes another than torch's default
            only if it is 1% faster; a name of diffusers' (`"native"`, `"_native_cudnn"`,
            `"flash"`, …); or `"fa3-fp8"`.
    """

    backend: str = AUTO
    _: KW_ONLY

    name: ClassVar[str] = "attention"
    stage: ClassVar[Stage] = "blocks"
    slot: ClassVar[str | None] = "attention"

    def __post_init__(self) -> None:
        known = (AUTO, FLOAT8, *(b.value for b in AttentionBackendName))
        if self.backend not in known:
            raise ValueError(f"backend={self.backend!r}; it must be one of {', '.join(known)}")

    @property
    def exactness(self) -> Exactness:
        """Another kernel rounds otherwise; float8 loses."""
        return "lossy" if self.backend == FLOAT8 else "close"

    def check(self, target: Target) -> Iterator[Finding]:
        """Refuse processors that are not Flux's own, and kernels that cannot run here."""
        transformer, environment = target.pipe.transformer, target.environment
        strange = {
            type(a.processor).__name__
            for a in _attentions(transformer)
            if type(a.processor) is not FluxAttnProcessor
        }
        if strange:
            yield Finding(
                "error",
                f"the attentions have processors of another kind: {', '.join(sorted(strange))}",
                "leave Attention out",
            )
        if self.backend.endswith("_hub"):
            yield Finding(
                "error",
                f"{self.backend} fetches its kernel from the Hub",
                "install a package instead, and name its backend",
            )
        elif self.backend not in (AUTO, FLOAT8) and (why := _unusable(transformer, self.backend)):
            yield Finding("error", f"{self.backend} does not run here: {why}", 'try "auto"')
        if self.backend == FLOAT8:
            if transformer.device.type != "cuda":
                yield Finding("warning", "float8 is emulated without a GPU: slower, for quality")
            elif environment.capability is not None and environment.capability < _CAPABLE:
                had = ".".join(map(str, environment.capability))
                yield Finding(
                    "error",
                    f"{environment.gpu} has compute capability {had}; FlashAttention-3 needs 9.0",
                    'use Attention("auto")',
                )
            elif importlib.util.find_spec("fa3_fwd_interface") is None:
                yield Finding("error", "FlashAttention-3 is not installed", "pip install fa3-fwd")

    def apply(self, tx: Transaction) -> Change:
        """Set every attention's processor."""
        transformer = tx.pipe.transformer
        attentions = list(_attentions(transformer))
        if self.backend == FLOAT8:
            for attention in attentions:
                tx.setattr(attention, "processor", Float8AttnProcessor())
            scales = _Scales(attentions)
            scales.prepare()
            tx.listen(scales)
            return Change(len(attentions), "attentions in float8")
        chosen, said = self.backend, ""
        if self.backend == AUTO:
            spent = _timed(transformer)
            chosen = min(spent, key=lambda name: spent[name], default="native")
            if spent and spent["native"] < spent[chosen] * _WORTH:
                chosen = "native"
            tx.tell(lambda: {"picked": chosen, **{f"{n}_seconds": s for n, s in spent.items()}})
            said = f" ({chosen}, the fastest here)" if spent else " (native: no GPU to time on)"
        if chosen == "native" and self.backend == AUTO:
            return Change(0, f"attentions changed{said}")
        for attention in attentions:
            backend = AttentionBackendName(chosen)
            tx.setattr(attention.processor, "_attention_backend", backend)
        return Change(len(attentions), f"attentions by {chosen}{said}")


class _Scales(Listener):
    """Keeps the fixed scales of queries and keys true to the norms' weights."""

    def __init__(self, attentions: list[Any]) -> None:
        self._attentions = attentions

    @override
    def prepare(self) -> None:
        """Compute them anew: weights may have been loaded, or moved, in between."""
        for attention in self._attentions:
            added = getattr(attention, "norm_added_q", None) is not None
            names = (("norm_q", "norm_added_q"), ("norm_k", "norm_added_k"))
            query, key = (
                bound([getattr(attention, n).weight for n in pair[: 1 + added]], attention.head_dim)
                for pair in names
            )
            attention.processor.query_scale, attention.processor.key_scale = query, key


def _attentions(transformer: Any) -> Iterator[Any]:
    return (block.attn for block in kontext.blocks(transformer))


def _unusable(transformer: Any, backend: str) -> str | None:
    """Say why a backend fails on a few tokens, or None."""
    attention = next(_attentions(transformer))
    weight = attention.norm_q.weight
    x = torch.zeros(
        1, 16, attention.heads, attention.head_dim, device=weight.device, dtype=weight.dtype
    )
    try:
        with torch.no_grad():
            dispatch_attention_fn(x, x, x, backend=AttentionBackendName(backend))
    except Exception as error:  # noqa: BLE001 - anyone's kernel
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _timed(transformer: Any) -> dict[str, float]:
    """Time the exact backends that run here, in seconds, at the size of an edit to 1024²."""
    attention = next(_attentions(transformer))
    weight = attention.norm_q.weight
    if weight.device.type != "cuda":
        return {}
    shape = (1, _TOKENS, attention.heads, attention.head_dim)
    with torch.random.fork_rng([weight.device]), torch.no_grad():
        q, k, v = (torch.randn(shape, device=weight.device, dtype=weight.dtype) for _ in "qkv")
        return {
            name: _seconds(
                partial(dispatch_attention_fn, q, k, v, backend=AttentionBackendName(name))
            )
            for name in _CANDIDATES
            if _unusable(transformer, name) is None
        }


def _seconds(run: Any) -> float:
    """Median of ten runs after two that warm up."""
    spent: list[float] = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        spent.append(start.elapsed_time(end) / 1e3)
    return median(spent[2:])
