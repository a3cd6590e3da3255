"""The one place that runs the transformer's blocks; passes wrap it, in list order.

A wrapper is handed a function that runs a range of consecutive blocks on a set of streams.
It may call it once, in parts, on fewer tokens, or not at all:

    def skip_block_7(run, streams, blocks, call):
        before, after = range(blocks.start, 7), range(8, blocks.stop)
        return run(run(streams, before), after)

Wrappers nest, the first of the list outermost, so a wrapper must expect to be called with
any part of the stack. They run between the compiled blocks, in plain Python; what changes
from step to step enters a block as a tensor, or each step would recompile it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from fluxfire import modules
from fluxfire.errors import FluxfireError
from fluxfire.model import Call, Model, Run, Streams

__all__ = ["BlockStack", "BlockWrapper"]


class BlockWrapper(Protocol):
    """A function around the run through some of the blocks."""

    def __call__(self, run: Run, streams: Streams, blocks: range, call: Call) -> Streams:
        """Run blocks `blocks.start` to `blocks.stop` on `streams`, or do something instead."""
        ...


class BlockStack:
    """The run through the blocks of one pipeline's transformer.

    Attributes:
        wrappers: outermost first. With none the transformer is left entirely alone.
    """

    def __init__(self, model: Model) -> None:
        self.wrappers: list[BlockWrapper] = []
        self._model = model

    @contextmanager
    def mounted(
        self, transformer: Any, call: Call, inputs: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        """Put the stack in the place of the blocks for one call of the transformer.

        Args:
            transformer: the model.
            call: which call this is.
            inputs: keyword arguments of the call.

        Yields:
            The keyword arguments to call the model with.

        Raises:
            FluxfireError: another library put its cache in the place of the blocks.
        """
        if not self.wrappers:
            yield inputs
            return
        if "foreign-cache" in modules.cache_traits(transformer):
            why, remedy = modules.FOREIGN_CACHE
            raise FluxfireError(f"{why}, since optimize(), in the place of its blocks; {remedy}")
        inputs = dict(inputs)
        run = self._model.runner(transformer, inputs)
        for wrapper in reversed(self.wrappers):
            run = functools.partial(_through, wrapper, run, call)
        everything = range(len(self._model.blocks(transformer)))
        with self._model.mount(transformer, lambda streams: run(streams, everything)):
            yield inputs


def _through(
    wrapper: BlockWrapper, run: Run, call: Call, streams: Streams, blocks: range
) -> Streams:
    return wrapper(run, streams, blocks, call) if blocks else streams
