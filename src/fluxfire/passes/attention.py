"""Attention: which kernel computes the transformer's attention."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import nn
from typing_extensions import override

from fluxfire.kontext import IPAdapterProcessor, PlainProcessor
from fluxfire.kontext.attention import (
    SCALES,
    FlashAttnProcessor,
    Float8AttnProcessor,
    HeadScales,
    bound,
    head_norms,
)
from fluxfire.passes.shared.attention_backends import FLASH_3, OFFERED, Sizes, fastest, why_not
from fluxfire.passes.shared.processors import Processors
from fluxfire.protocol import Change, Exactness, Finding, Stage, Target
from fluxfire.runtime.freshness import Watch
from fluxfire.runtime.generation import Listener
from fluxfire.runtime.transaction import Transaction
from fluxfire.supported import model_of

FLOAT8 = "fa3-fp8"
_OWN = {FLASH_3: FlashAttnProcessor, FLOAT8: Float8AttnProcessor}
_HOPPER = (9, 0)
_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Attention:
    """Computes the transformer's attention with a kernel of one's choice.

    The choice is this transformer's own. diffusers' `set_attention_backend` may set the whole
    process's active backend besides; here that stays as it is.

    `"auto"` measures, on the GPU that the pipeline runs on, the exact kernels that run there, at
    the size of an edit of one megapixel (8704 tokens) and with the heads and dtype of this
    transformer: torch's own and, where installed, FlashAttention 2 and 3. It takes the fastest
    that gives the native result and compiles without a graph break, if that beats the native one
    by a percent, and the report says what each took. Equal settings are measured once a process.
    Without a GPU it takes the native one.

    `"fa3"` is FlashAttention-3 (https://arxiv.org/abs/2407.08608). With a mask, without rotation,
    and while gradients are on, attention is diffusers' own.

    `"fa3-fp8"` is the same in float8 (e4m3): lossy. Query and key have been through an RMS norm,
    which bounds them, and a rotation, which keeps the bound; so their scale is known without
    looking at them. Values are scaled by each sample's and head's largest. Norm, rotation and the
    rounding to float8 are one kernel. On a CPU it is emulated, but for the rounding of the
    probabilities. Others measured an error of about 5% for attention in float8 at FLUX's shapes; no
    picture of the real FLUX.1 Kontext with it was measured, by us or by others that we know of.

    Measured on an H100 (docs, "Passes") with `fa3-fwd` installed: a step of `faithful`
    274 → 264 ms, with `"fa3-fp8"` 274 → 250 ms.

    Needs the package `fa3-fwd` and a Hopper GPU for `"fa3"` and `"fa3-fp8"`.

    A kernel that cannot run where the pipeline is, `"fa3"` on a CPU among them, is refused.

    Attributes:
        backend: `"auto"`; a backend of diffusers by its name there, such as `"native"`,
            `"_native_cudnn"` or `"flash"`; `"fa3"` or `"fa3-fp8"`.

    Raises:
        ValueError: `backend` is no such name.
    """

    backend: str = "auto"

    name: ClassVar[str] = "attention"
    stage: ClassVar[Stage] = "blocks"
    slot: ClassVar[str | None] = "attention"

    def __post_init__(self) -> None:
        known = ["auto", *_OWN, *(backend.value for backend in AttentionBackendName)]
        if self.backend not in known:
            raise ValueError(f"backend={self.backend!r}; it must be one of {', '.join(known)}")
        # A member of diffusers' enumeration equals its name, but its repr rebuilds nothing.
        object.__setattr__(self, "backend", known[known.index(self.backend)])

    @property
    def exactness(self) -> Exactness:
        """Lossy where the kernel quantizes, else close: another kernel rounds differently."""
        return "lossy" if self.backend == FLOAT8 or "sage" in self.backend else "close"

    def check(self, target: Target) -> Iterator[Finding]:
        """Refuse processors that have no choice of kernels, and a kernel that cannot run here."""
        yield from self._check_processors(target.pipe)
        if self.backend in _OWN:
            yield from self._check_fa3(target)
        elif self.backend == "auto":
            if _device(target.pipe).type != "cuda":
                yield Finding("info", "without a GPU nothing is measured: native attention it is")
        elif self.backend.endswith("_hub"):
            yield Finding(
                "error",
                f"backend={self.backend!r} runs code downloaded from the Hub",
                "install the package that has the kernel, and name its backend, such as 'flash'",
            )
        elif (why := why_not(self.backend, _sizes(target.pipe))) is not None:
            yield _refused(f"backend={self.backend!r} does not run here: {why}")

    def apply(self, tx: Transaction) -> Change:
        """Choose, and set the kernel on every attention of the transformer."""
        backend, what = self.backend, f"attentions computed by {self.backend}"
        if backend == "auto":
            backend, what = self._measure(tx)
        elif backend == FLOAT8 and _device(tx.pipe).type != "cuda":
            what += ", emulated without a GPU"
        attentions = model_of(tx.pipe).attentions(tx.pipe.transformer)
        if backend in _OWN:
            processors = Processors(tx.pipe.transformer, _OWN[backend])
            tx.on_undo(processors.give_back)
            processors.prepare()
            tx.listen(processors)
        else:
            for attention in attentions:
                tx.setattr(attention.processor, "_attention_backend", AttentionBackendName(backend))
        if backend == FLOAT8:
            for attention in attentions:
                tx.setattr(attention, SCALES, _scales(attention))
            tx.listen(_Scales(attentions))
        return Change(len(attentions), what)

    def _measure(self, tx: Transaction) -> tuple[str, str]:
        """Return the fastest backend, and what to say of the choice."""
        sizes = _sizes(tx.pipe)
        if sizes.device.type != "cuda":
            return "native", "attentions computed by native, unmeasured without a GPU"
        plain = all(
            type(a.processor) is PlainProcessor
            for a in model_of(tx.pipe).attentions(tx.pipe.transformer)
        )
        made = fastest(sizes, OFFERED if plain else tuple(n for n in OFFERED if n not in _OWN))
        tx.report_facts(made.facts)
        took = ", ".join(f"{name} {ms:.3f} ms" for name, ms in made.milliseconds.items())
        return made.backend, f"attentions computed by {made.backend} (of {took})"

    def _check_processors(self, pipe: Any) -> Iterator[Finding]:
        known = [PlainProcessor]
        if self.backend not in _OWN:
            known.append(IPAdapterProcessor)
        used = {type(a.processor) for a in model_of(pipe).attentions(pipe.transformer)}
        if strange := sorted(cls.__name__ for cls in used if cls not in known):
            names = " and ".join(cls.__name__ for cls in known)
            yield Finding(
                "error",
                f"the transformer's attention runs through {', '.join(strange)}, and "
                f"backend={self.backend!r} works on {names}",
                "leave Attention out",
            )

    def _check_fa3(self, target: Target) -> Iterator[Finding]:
        transformer, environment = target.pipe.transformer, target.environment
        elsewhere = target.traits & {"sequential-offload", "group-offload"}
        if elsewhere and self.backend == FLOAT8:
            yield Finding(
                "error",
                f"the norms' weights, which give the scales, are elsewhere "
                f"({', '.join(sorted(elsewhere))})",
                "use enable_model_cpu_offload() or none",
            )
        device = _device(target.pipe)
        if device.type != "cuda":
            yield (
                Finding(
                    "warning", f"{FLOAT8} is emulated without a GPU: slower, for quality's sake"
                )
                if self.backend == FLOAT8
                else _refused(
                    f"the pipeline runs on {device}, and FlashAttention-3 needs a Hopper GPU"
                )
            )
            return
        if environment.capability != _HOPPER:
            had = ".".join(map(str, environment.capability or ()))
            yield _refused(
                f"{environment.gpu} has compute capability {had}, and FlashAttention-3 needs 9.0"
            )
        if importlib.util.find_spec("fa3_fwd") is None:
            yield _refused(
                "FlashAttention-3 is not installed", "pip install fa3-fwd, or use Attention()"
            )
        if transformer.dtype not in _DTYPES:
            dtypes = " or ".join(str(dtype) for dtype in _DTYPES)
            yield _refused(
                f"the transformer is in {transformer.dtype}, and {self.backend} takes {dtypes}",
                "cast the pipeline, or use Attention()",
            )


def _refused(
    why: str, remedy: str = "use Attention(), which finds a kernel that runs here"
) -> Finding:
    """Refuse a kernel, in whose place another is found by measuring."""
    return Finding("error", why, remedy, instead=Attention())


class _Scales(Listener):
    """Keeps the fixed scales of queries and keys true to the norms' weights."""

    def __init__(self, attentions: list[Any]) -> None:
        self._attentions = attentions
        self._watched: list[nn.Module] = []
        self._watch = Watch([])

    @override
    def prepare(self) -> None:
        """Compute them anew where weights were loaded, changed or moved in between."""
        there = [norm for attention in self._attentions for norm in head_norms(attention)]
        devices = {getattr(attention, SCALES).query.device for attention in self._attentions}
        moved = devices != {norm.weight.device for norm in there}
        if there != self._watched:
            self._watched, self._watch = there, Watch(there)
        elif not self._watch.changed() and not moved:
            return
        for attention in self._attentions:
            scales, now = getattr(attention, SCALES), _scales(attention)
            scales.query, scales.key = now.query, now.key


def _scales(attention: Any) -> HeadScales:
    joint = getattr(attention, "norm_added_q", None) is not None
    of_query = ("norm_q", "norm_added_q") if joint else ("norm_q",)
    of_key = ("norm_k", "norm_added_k") if joint else ("norm_k",)
    query, key = (
        bound([getattr(attention, name).weight for name in names], attention.head_dim)
        for names in (of_query, of_key)
    )
    return HeadScales(query, key)


def _device(pipe: Any) -> torch.device:
    """Return where the transformer runs, also while it waits elsewhere for its turn."""
    own: torch.device = pipe.transformer.device
    return own if own.type == "cuda" else pipe._execution_device  # noqa: SLF001 - diffusers' own


def _sizes(pipe: Any) -> Sizes:
    config = pipe.transformer.config
    heads, width = config.num_attention_heads, config.attention_head_dim
    return Sizes(_device(pipe), pipe.transformer.dtype, heads, width)
