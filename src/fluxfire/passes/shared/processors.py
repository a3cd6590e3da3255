"""Replaces diffusers' attention processors with fluxfire's while a pass is applied."""

from __future__ import annotations

from typing_extensions import override

from fluxfire.diffusers_types import Transformer
from fluxfire.edits.stand_in import own_class
from fluxfire.kontext import KONTEXT, PlainProcessor
from fluxfire.kontext.attention import (
    KernelAttnProcessor,
    ReferenceAttnProcessor,
    has_plain_head_norms,
)
from fluxfire.runtime.generation import Listener


class ProcessorSwap(Listener):
    """Turns diffusers' Flux processors into instances of a fluxfire subclass.

    Somebody may replace processors at any time; loading and unloading an IP-adapter both do. So
    before every generation this converts any new Flux processors. Processors of other classes stay
    as they are.
    """

    def __init__(self, transformer: Transformer, cls: type[ReferenceAttnProcessor]) -> None:
        self._transformer, self._cls = transformer, cls

    @override
    def prepare(self) -> None:
        """Convert every processor that is diffusers' own Flux processor.

        A kernel computes the head norms from their weights. An attention with other norms, or with
        hooks on them, keeps or gets back diffusers' processor.
        """
        for attention in KONTEXT.attentions(self._transformer):
            fits = not issubclass(self._cls, KernelAttnProcessor) or has_plain_head_norms(attention)
            if fits and type(attention.processor) is PlainProcessor:
                attention.processor.__class__ = self._cls
            elif not fits and type(attention.processor) is self._cls:
                attention.processor.__class__ = own_class(attention.processor)

    def restore(self) -> None:
        """Convert the processors back to diffusers' own class."""
        for attention in KONTEXT.attentions(self._transformer):
            if type(attention.processor) is self._cls:
                attention.processor.__class__ = own_class(attention.processor)
