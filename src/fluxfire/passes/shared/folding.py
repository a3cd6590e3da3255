"""When to fold LoRAs again: the state machine that passes with folded weights share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import nn
from typing_extensions import override

from fluxfire import modules
from fluxfire.passes.shared.adapters import call_scale, read_scalings
from fluxfire.runtime.freshness import Watch
from fluxfire.runtime.generation import Listener

__all__ = ["Folder"]


class Folder(Listener, ABC):
    """Folds again when layers, weights, adapters or their scale have changed.

    An interrupt may come at any time. So this class believes in a folding only when it is done.

    Attributes:
        ignored: attributes of the layers that the pass itself sets.
        layers: what is folded: linear layers, or PEFT's layers around them.
    """

    ignored: ClassVar[tuple[str, ...]] = ()
    layers: Sequence[nn.Module] = ()
    _watch: Watch | None = None  # None: fold again
    _scalings: Sequence[str]
    _scale = _folded_scale = 1.0

    @abstractmethod
    def fold(self, layers: Sequence[nn.Module], scale: float) -> None:
        """Compute the weights of all layers with their adapters.

        Args:
            layers: the layers.
            scale: a factor for all adapters.
        """

    def take(self, layers: Sequence[nn.Module]) -> None:
        """Make these the layers to fold."""
        if list(map(id, layers)) != list(map(id, self.layers)):
            self.layers, self._watch = layers, None

    def fold_if_changed(self) -> None:
        """Fold if anything has changed since the last time."""
        if (
            self._watch is None
            or self._watch.changed()
            or read_scalings(self.layers) != self._scalings
        ):
            self._fold()

    def accept(self) -> None:
        """Believe that what is folded comes from the layers as they are now."""
        self._accept(self._watch)

    @override
    def before_call(self, inputs: dict[str, Any]) -> None:
        """Fold again if the call scales the adapters by another factor than the last call."""
        self._scale = call_scale(inputs)
        # The scale that was folded counts: an interrupt may have come before the last folding.
        if (self._watch is None or self._scale != self._folded_scale) and any(
            map(modules.has_adapter, self.layers)
        ):
            self._fold()

    def _fold(self) -> None:
        watch, self._watch = self._watch, None  # so that an interrupt leaves nothing believed
        with _without_autocast():
            self.fold(self.layers, self._scale)
        self._folded_scale = self._scale
        self._accept(watch)

    def _accept(self, watch: Watch | None) -> None:
        if watch is None:
            watch = Watch(self.layers, apart_from=("scaling", *self.ignored))
        else:
            watch.changed()
            watch.accept()
        self._scalings, self._watch = read_scalings(self.layers), watch


@contextmanager
def _without_autocast() -> Iterator[None]:
    """Sum and round in the dtypes that the code names, also if the pipeline runs under autocast."""
    with ExitStack() as entered:
        for kind in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
            entered.enter_context(torch.autocast(kind, enabled=False))
        yield
