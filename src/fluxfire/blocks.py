"""The one place that runs the transformer's blocks; passes wrap it, in list order.

A wrapper is handed a function that runs a range of consecutive blocks on a set of streams.
It may call it once, in parts, on fewer tokens, or not at all:

    def skip_block_7(run, streams, blocks, call):
        before, after = range(blocks.start, 7), range(8, blocks.stop)
        return run(run(streams, before), after)

Wrappers nest, the first of the list outermost, so a wrapper must expect to be called with
any part of the stack. They run between the compiled blocks, in plain Python; what changes
from step to step enters a block as a tensor, or each step would recompile it.

No module is replaced. While the transformer runs, its two lists of blocks are shadowed on
the instance by a list of one callable, the whole stack, and an empty one; diffusers' own
forward does the rest, so embeddings and output projection stay the library's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, Protocol

import torch

from fluxfire import kontext
from fluxfire.errors import FluxfireError
from fluxfire.kontext import Call

__all__ = ["BlockStack", "BlockWrapper", "Run", "Streams", "unmount"]


@dataclass(frozen=True, slots=True, eq=False)
class Streams:
    """What flows through the blocks.

    Attributes:
        image: (batch, image tokens, width): noise tokens, then reference tokens.
        text: (batch, text tokens, width).
        temb: (batch, width): embedding of timestep, guidance and pooled text.
        rotary: cosine and sine, each (text tokens + image tokens, head width), text first.
        attention_kwargs: `joint_attention_kwargs` as diffusers passes it on.
        temb_by_block: what each block gets in the place of `temb`, if not that.
        arguments: attention arguments of each block's own, asked for when it is about to run.
    """

    image: torch.Tensor
    text: torch.Tensor
    temb: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor]
    attention_kwargs: dict[str, Any] | None
    temb_by_block: Sequence[torch.Tensor] | None = None
    arguments: Callable[[int], dict[str, Any]] | None = None


Run = Callable[[Streams, range], Streams]


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

    def __init__(self) -> None:
        self.wrappers: list[BlockWrapper] = []

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
        if "foreign-cache" in kontext.cache_traits(transformer):
            why, remedy = kontext.FOREIGN_CACHE
            raise FluxfireError(f"{why}, since optimize(), in the place of its blocks; {remedy}")
        inputs = dict(inputs)
        run = self._wrapped(_plain_run(transformer, inputs), call)
        everything = range(len(kontext.blocks(transformer)))

        # The argument names are diffusers'; gradient checkpointing passes them by position.
        def stack(
            hidden_states: torch.Tensor,
            encoder_hidden_states: torch.Tensor,
            temb: torch.Tensor,
            image_rotary_emb: tuple[torch.Tensor, torch.Tensor],
            joint_attention_kwargs: dict[str, Any] | None = None,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            streams = Streams(
                hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
            )
            out = run(streams, everything)
            return out.text, out.image

        own = vars(transformer)  # past Module.__setattr__, which would drop the real lists
        try:
            own["transformer_blocks"] = [stack]
            own["single_transformer_blocks"] = []
            yield inputs
        finally:
            unmount(transformer)

    def _wrapped(self, run: Run, call: Call) -> Run:
        for wrapper in reversed(self.wrappers):
            run = functools.partial(_through, wrapper, run, call)
        return run


def unmount(transformer: Any) -> None:
    """Give a transformer its blocks back; an interrupt may have kept a call from doing so."""
    for name in ("transformer_blocks", "single_transformer_blocks"):
        vars(transformer).pop(name, None)


def _through(
    wrapper: BlockWrapper, run: Run, call: Call, streams: Streams, blocks: range
) -> Streams:
    return wrapper(run, streams, blocks, call) if blocks else streams


def _plain_run(transformer: Any, inputs: dict[str, Any]) -> Run:
    """Make the innermost run: exactly what diffusers' own loops do.

    ControlNet residuals are taken out of `inputs` (the model would spread them over the
    shadowed lists, and so get them wrong) and added here, after the same blocks.
    """
    blocks = kontext.blocks(transformer)
    residuals = _residuals(transformer, inputs)

    def run(streams: Streams, which: range) -> Streams:
        image, text, tembs = streams.image, streams.text, streams.temb_by_block
        for index in which:
            arguments = streams.attention_kwargs
            if streams.arguments is not None:
                arguments = {**(arguments or {}), **streams.arguments(index)}
            text, image = blocks[index](
                hidden_states=image,
                encoder_hidden_states=text,
                temb=streams.temb if tembs is None else tembs[index],
                image_rotary_emb=streams.rotary,
                joint_attention_kwargs=arguments,
            )
            if index in residuals:
                image = image + residuals[index][:, : image.shape[1]]
        return replace(streams, image=image, text=text)

    return run


def _residuals(transformer: Any, inputs: dict[str, Any]) -> dict[int, torch.Tensor]:
    """Say which ControlNet residual follows which block."""
    double, single = len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)
    repeat = inputs.pop("controlnet_blocks_repeat", False)
    found = {}
    for name, first, count, cycle in (
        ("controlnet_block_samples", 0, double, repeat),
        ("controlnet_single_block_samples", double, single, False),
    ):
        samples = inputs.pop(name, None)
        if samples is not None:
            interval = ceil(count / len(samples))
            for i in range(count):
                found[first + i] = samples[i % len(samples) if cycle else i // interval]
    return found
