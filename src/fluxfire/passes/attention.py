"""Attention: which kernel computes the transformer's attention."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import nn
from typing_extensions import override

from fluxfire.diffusers_types import AttentionModule, Pipeline
from fluxfire.kontext import IPAdapterProcessor, PlainProcessor
from fluxfire.kontext.attention import (
    SCALES_ATTRIBUTE,
    FlashAttnProcessor,
    Float8AttnProcessor,
    QueryKeyScales,
    has_plain_head_norms,
    head_norms,
    query_key_scale,
)
from fluxfire.passes.shared.attention_backends import (
    CANDIDATES,
    FLASH_3,
    Sizes,
    find_problem,
    measure,
)
from fluxfire.passes.shared.processors import ProcessorSwap
from fluxfire.protocol import Change, Exactness, Finding, Stage, Target
from fluxfire.runtime.freshness import Watch
from fluxfire.runtime.generation import Listener
from fluxfire.runtime.transaction import Transaction
from fluxfire.supported import model_of

FLASH_3_FLOAT8 = "fa3-fp8"
_OWN_PROCESSORS = {FLASH_3: FlashAttnProcessor, FLASH_3_FLOAT8: Float8AttnProcessor}
_HOPPER = (9, 0)
_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Attention:
    """Computes the transformer's attention with the kernel you choose.

    The setting applies to this transformer only. diffusers' `set_attention_backend` may also change
    the active backend of the whole process; this pass does not.

    `"auto"` measures the exact kernels that run on the pipeline's GPU: torch's own, and
    FlashAttention 2 and 3 if they are installed. It measures them for an edit of one megapixel
    (8704 tokens) with this transformer's heads and dtype. It uses the fastest kernel that gives the
    native result and compiles without a graph break, if that kernel is at least 1% faster than the
    native one. The report lists all times. A process measures equal settings only once. Without a
    GPU, `"auto"` uses the native kernel.

    `"fa3"` is FlashAttention-3 (https://arxiv.org/abs/2407.08608). diffusers' own attention runs in
    its place for a call with a mask, for a call without rotary embedding, and while gradients are
    on.

    `"fa3-fp8"` is FlashAttention-3 in float8 (e4m3), which is lossy. The RMS norm bounds query and
    key, and the rotary embedding keeps the bound, so their scale is fixed in advance. The values'
    scale is the largest value of each sample and head. One kernel does norm, rotary embedding and
    rounding to float8. A CPU emulates all of it except the rounding of the probabilities. Others
    measured an error of about 5% for float8 attention at FLUX's shapes. We measured no picture of
    the real FLUX.1 Kontext with `"fa3-fp8"`, and know of nobody who has.

    Measured on an H100 (docs, "Passes") with `fa3-fwd` installed: a step of `faithful`
    274 → 264 ms, with `"fa3-fp8"` 274 → 250 ms.

    Needs the package `fa3-fwd` and a Hopper GPU for `"fa3"` and `"fa3-fp8"`.

    The pass refuses a kernel that cannot run on the pipeline's device, such as `"fa3"` on a CPU.

    Attributes:
        backend: `"auto"`; diffusers' name of one of its backends, such as `"native"`,
            `"_native_cudnn"` or `"flash"`; `"fa3"` or `"fa3-fp8"`.

    Raises:
        ValueError: `backend` is not one of these names.
    """

    backend: str = "auto"

    name: ClassVar[str] = "attention"
    stage: ClassVar[Stage] = "blocks"
    slot: ClassVar[str | None] = "attention"

    def __post_init__(self) -> None:
        known = ["auto", *_OWN_PROCESSORS, *(backend.value for backend in AttentionBackendName)]
        if self.backend not in known:
            raise ValueError(f"backend={self.backend!r}; it must be one of {', '.join(known)}")
        # A member of diffusers' enumeration is equal to its name, but its repr is no valid code.
        object.__setattr__(self, "backend", known[known.index(self.backend)])

    @property
    def exactness(self) -> Exactness:
        """Lossy if the kernel quantizes; close otherwise, since kernels round differently."""
        quantizes = self.backend == FLASH_3_FLOAT8 or "sage" in self.backend
        return "lossy" if quantizes else "close"

    def check(self, target: Target) -> Iterator[Finding]:
        """Refuse processors without selectable kernels, and kernels that cannot run here."""
        yield from self._check_processors(target.pipe)
        if self.backend in _OWN_PROCESSORS:
            yield from self._check_fa3(target)
        elif self.backend == "auto":
            if _device(target.pipe).type != "cuda":
                yield Finding("info", "no GPU to measure on; using PyTorch's native attention")
        elif self.backend.endswith("_hub"):
            yield Finding(
                "error",
                f"backend={self.backend!r} runs code downloaded from the Hub",
                "install the package that has the kernel, and name its backend, such as 'flash'",
            )
        elif (why := find_problem(self.backend, _sizes(target.pipe))) is not None:
            yield _refuse(f"backend={self.backend!r} does not run here: {why}")

    def apply(self, tx: Transaction) -> Change:
        """Choose the kernel, and set it on every attention of the transformer."""
        backend, what = self.backend, f"attentions computed by {self.backend}"
        if backend == "auto":
            backend, what = self._measure(tx)
        elif backend == FLASH_3_FLOAT8 and _device(tx.pipe).type != "cuda":
            what += ", emulated without a GPU"
        attentions = model_of(tx.pipe).attentions(tx.pipe.transformer)
        if backend in _OWN_PROCESSORS:
            swap = ProcessorSwap(tx.pipe.transformer, _OWN_PROCESSORS[backend])
            tx.on_undo(swap.restore)
            swap.prepare()
            tx.listen(swap)
        else:
            for attention in attentions:
                tx.setattr(attention.processor, "_attention_backend", AttentionBackendName(backend))
        if backend == FLASH_3_FLOAT8:
            updater = _ScaleUpdater(tx.pipe)
            tx.on_undo(updater.remove)
            updater.prepare()
            tx.listen(updater)
        return Change(len(attentions), what)

    def _measure(self, tx: Transaction) -> tuple[str, str]:
        """Return the fastest backend, and the description of the choice for the report."""
        sizes = _sizes(tx.pipe)
        if sizes.device.type != "cuda":
            return "native", "attentions computed by native, unmeasured without a GPU"
        plain = all(
            type(a.processor) is PlainProcessor
            for a in model_of(tx.pipe).attentions(tx.pipe.transformer)
        )
        others = tuple(name for name in CANDIDATES if name not in _OWN_PROCESSORS)
        measured = measure(sizes, CANDIDATES if plain else others)
        tx.report_facts(measured.facts)
        times = ", ".join(f"{name} {ms:.3f} ms" for name, ms in measured.milliseconds.items())
        return measured.backend, f"attentions computed by {measured.backend} (of {times})"

    def _check_processors(self, pipe: Pipeline) -> Iterator[Finding]:
        known = [PlainProcessor]
        if self.backend not in _OWN_PROCESSORS:
            known.append(IPAdapterProcessor)
        used = {type(a.processor) for a in model_of(pipe).attentions(pipe.transformer)}
        if strange := sorted(cls.__name__ for cls in used if cls not in known):
            names = " and ".join(cls.__name__ for cls in known)
            yield Finding(
                "error",
                f"the transformer's attention runs through {', '.join(strange)}, and "
                f"backend={self.backend!r} works only on {names}",
                "leave Attention out",
            )

    def _check_fa3(self, target: Target) -> Iterator[Finding]:
        transformer, environment = target.pipe.transformer, target.environment
        offloaded = target.traits & {"sequential-offload", "group-offload"}
        if offloaded and self.backend == FLASH_3_FLOAT8:
            yield Finding(
                "error",
                f"{self.backend} computes its scales from the norms' weights, and offloading "
                f"({', '.join(sorted(offloaded))}) keeps these weights elsewhere",
                "use enable_model_cpu_offload() or none",
            )
        device = _device(target.pipe)
        if device.type != "cuda":
            if self.backend == FLASH_3_FLOAT8:
                yield Finding(
                    "warning",
                    f"{FLASH_3_FLOAT8} is emulated without a GPU: slow, only to judge quality",
                )
            else:
                yield _refuse(
                    f"the pipeline runs on {device}, and FlashAttention-3 needs a Hopper GPU"
                )
            return
        if environment.capability != _HOPPER:
            capability = ".".join(map(str, environment.capability or ()))
            yield _refuse(
                f"{environment.gpu} has compute capability {capability}, "
                f"and FlashAttention-3 needs 9.0"
            )
        if importlib.util.find_spec("fa3_fwd") is None:
            yield _refuse(
                "FlashAttention-3 is not installed", "pip install fa3-fwd, or use Attention()"
            )
        if transformer.dtype not in _DTYPES:
            dtypes = " or ".join(str(dtype) for dtype in _DTYPES)
            yield _refuse(
                f"the transformer is in {transformer.dtype}, and {self.backend} takes {dtypes}",
                "cast the pipeline, or use Attention()",
            )


def _refuse(
    why: str, remedy: str = "use Attention(), which finds a kernel that runs here"
) -> Finding:
    """Refuse a kernel, and suggest `Attention()`, which measures to find another."""
    return Finding("error", why, remedy, instead=Attention())


class _ScaleUpdater(Listener):
    """Gives attentions their query and key scales, and again if the norms' weights change."""

    def __init__(self, pipe: Pipeline) -> None:
        self._model, self._transformer = model_of(pipe), pipe.transformer
        self._watched: list[nn.Module] = []
        self._watch = Watch([])

    @override
    def prepare(self) -> None:
        """Recompute the scales if weights were loaded, changed or moved since the last call."""
        attentions = [
            attention
            for attention in self._model.attentions(self._transformer)
            if has_plain_head_norms(attention)
        ]
        norms = [norm for attention in attentions for norm in head_norms(attention)]
        scales = [getattr(attention, SCALES_ATTRIBUTE, None) for attention in attentions]
        devices = {scale.query.device for scale in scales if scale is not None}
        moved = devices != {norm.weight.device for norm in norms}
        watch = self._watch if norms == self._watched else Watch(norms)
        changed = watch is not self._watch or watch.changed()
        if not changed and not moved and None not in scales:
            return
        for attention, outdated in zip(attentions, scales, strict=True):
            current = _query_key_scales(attention)
            if outdated is None:  # somebody added this block after the last call
                setattr(attention, SCALES_ATTRIBUTE, current)
            else:  # in place, since compiled code refers to this object
                outdated.query, outdated.key = current.query, current.key
        watch.accept()
        self._watched, self._watch = norms, watch

    def remove(self) -> None:
        """Remove the scales from the attentions."""
        for attention in self._model.attentions(self._transformer):
            vars(attention).pop(SCALES_ATTRIBUTE, None)


def _query_key_scales(attention: AttentionModule) -> QueryKeyScales:
    has_text = getattr(attention, "norm_added_q", None) is not None
    query_norms = ("norm_q", "norm_added_q") if has_text else ("norm_q",)
    key_norms = ("norm_k", "norm_added_k") if has_text else ("norm_k",)
    query, key = (
        query_key_scale([getattr(attention, name).weight for name in names], attention.head_dim)
        for names in (query_norms, key_norms)
    )
    return QueryKeyScales(query, key)


def _device(pipe: Pipeline) -> torch.device:
    """Return the device that the transformer runs on, even while it is offloaded."""
    own: torch.device = pipe.transformer.device
    return own if own.type == "cuda" else pipe._execution_device  # noqa: SLF001 - no public name


def _sizes(pipe: Pipeline) -> Sizes:
    config = pipe.transformer.config
    heads, width = config.num_attention_heads, config.attention_head_dim
    return Sizes(_device(pipe), pipe.transformer.dtype, heads, width)
