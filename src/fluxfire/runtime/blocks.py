"""Runs the transformer's blocks. Passes wrap this run, in the order of the list.

A wrapper gets a function `run`, which runs a range of consecutive blocks on a set of streams. The
wrapper may call `run` once, for parts of the range, on fewer tokens, or not at all:

    def skip_block_7(run, streams, blocks, call):
        before, after = range(blocks.start, 7), range(8, blocks.stop)
        return run(run(streams, before), after)

Wrappers nest, and the first of the list is the outermost. So a wrapper may be called with any part
of the blocks. Wrappers run between the compiled blocks, in plain Python. A value that changes from
step to step must enter a block as a tensor; with a Python number, torch would recompile the block
in each step.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from fluxfire import modules
from fluxfire.diffusers_types import Transformer
from fluxfire.errors import FluxfireError
from fluxfire.model import Call, Model, Run, Streams

__all__ = ["BlockStack", "BlockWrapper"]


class BlockWrapper(Protocol):
    """A function that runs some blocks, or does something else in their place."""

    def __call__(self, run: Run, streams: Streams, blocks: range, call: Call) -> Streams:
        """Compute the output of some blocks.

        Args:
            run: runs a range of blocks, inside the wrappers that follow.
            streams: the input of the first block.
            blocks: the indices of the blocks, without `blocks.stop`.
            call: the transformer call.

        Returns:
            The output of the last block.
        """
        ...


class BlockStack:
    """The blocks of one pipeline's transformer, and the wrappers around them.

    Attributes:
        wrappers: the outermost first. Without wrappers the transformer runs its blocks itself.
        innermost: wrappers inside all of these.
    """

    def __init__(self, model: Model) -> None:
        self.wrappers: list[BlockWrapper] = []
        self.innermost: list[BlockWrapper] = []
        self._model = model

    @contextmanager
    def mount(
        self, transformer: Transformer, call: Call, inputs: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        """Mount the stack in place of the blocks, for one transformer call.

        Args:
            transformer: the transformer.
            call: the transformer call.
            inputs: keyword arguments of the call.

        Yields:
            The keyword arguments with which to call the transformer.

        Raises:
            FluxfireError: another library's cache has taken the place of the blocks, or the whole
                transformer was compiled.
        """
        wrappers = [*self.wrappers, *self.innermost]
        if not wrappers:
            yield inputs
            return
        if "foreign-cache" in modules.cache_traits(transformer):
            why, remedy = modules.FOREIGN_CACHE
            raise FluxfireError(
                f"{why}, since optimize(): it runs in the place of its blocks; {remedy}"
            )
        if modules.is_compiled(transformer):
            raise FluxfireError(
                "the transformer's forward was compiled after optimize(), and one graph cannot "
                "contain the wrappers of the blocks; undo that compilation, and use Compile()"
            )
        inputs = dict(inputs)
        run = self._model.runner(transformer, inputs)
        for wrapper in reversed(wrappers):
            run = functools.partial(_run_wrapped, wrapper, run, call)
        all_blocks = range(len(self._model.blocks(transformer)))
        with self._model.mount(transformer, lambda streams: run(streams, all_blocks)):
            yield inputs


def _run_wrapped(
    wrapper: BlockWrapper, run: Run, call: Call, streams: Streams, blocks: range
) -> Streams:
    return wrapper(run, streams, blocks, call) if blocks else streams
