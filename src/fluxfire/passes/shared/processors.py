"""Attention processors that stand in for diffusers' own while a pass is applied."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from fluxfire.edits.stand_in import own_class
from fluxfire.kontext import KONTEXT, PlainProcessor
from fluxfire.kontext.attention import KeepingAttnProcessor
from fluxfire.runtime.generation import Listener


class Processors(Listener):
    """Has the attentions of a transformer run through a stand-in for Flux's processor.

    Processors may be replaced at any time: loading an IP-adapter does it, and taking it off, too.
    New ones of Flux's kind are turned into stand-ins before the next generation; others stay as
    they are.
    """

    def __init__(self, transformer: Any, cls: type[KeepingAttnProcessor]) -> None:
        self._transformer, self._cls = transformer, cls

    @override
    def prepare(self) -> None:
        """Turn all that are diffusers' own."""
        for attention in KONTEXT.attentions(self._transformer):
            if type(attention.processor) is PlainProcessor:
                attention.processor.__class__ = self._cls

    def give_back(self) -> None:
        """Turn them back."""
        for attention in KONTEXT.attentions(self._transformer):
            if type(attention.processor) is self._cls:
                attention.processor.__class__ = own_class(attention.processor)
