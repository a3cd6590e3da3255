"""The interface between fluxfire and a model architecture: tokens, calls, blocks.

`kontext/` implements it for FLUX.1 Kontext. The rest of fluxfire uses only this interface, so
another architecture needs another implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from fluxfire.diffusers_types import AttentionModule, Pipeline, Transformer


@dataclass(frozen=True, slots=True)
class Tokens:
    """Number of tokens of each kind in a transformer call.

    The image stream has `noise` tokens followed by `reference` tokens. The pipeline uses only the
    noise tokens of the output. The text stream has `text` tokens.
    """

    noise: int
    reference: int
    text: int


def _same(numbers: torch.Tensor) -> torch.Tensor:
    return numbers


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One transformer call of a generation.

    Attributes:
        step: denoising step, counted from 0.
        steps: number of steps of the generation.
        branch: `"cond"`, or `"uncond"` for the second call of a step under true CFG.
        timestep: (batch,), in [0, 1]. A tensor, so that it can enter compiled code. It has the
            latents' dtype, and bfloat16 rounds it by up to the distance of two steps.
        sigma: the noise level: float32, without dimensions.
        tokens: number of tokens of each kind.
        agree: returns the same numbers on all processes that compute this generation together: the
            largest of each. A decision that depends on numbers must depend on these, or one process
            would skip blocks at which the others wait for it. Waits for the device.
    """

    step: int
    steps: int
    branch: str
    timestep: torch.Tensor
    sigma: torch.Tensor
    tokens: Tokens
    agree: Callable[[torch.Tensor], torch.Tensor] = _same


@dataclass(frozen=True, slots=True, eq=False)
class Streams:
    """The tensors that pass from block to block, and the other arguments of a block.

    Attributes:
        image: (batch, image tokens, width): noise tokens, then reference tokens.
        text: (batch, text tokens, width).
        temb: (batch, width): embedding of timestep, guidance and pooled text.
        rotary: cosine and sine, each (text tokens + image tokens, head width), text first.
        attention_kwargs: the `joint_attention_kwargs` that diffusers passes to the blocks.
        temb_by_block: for each block, the tensor that it gets instead of `temb`; None if all blocks
            get `temb`.
        arguments: returns additional attention arguments for a block, by the block's index.
    """

    image: torch.Tensor
    text: torch.Tensor
    temb: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor]
    attention_kwargs: dict[str, Any] | None
    temb_by_block: Sequence[torch.Tensor] | None = None
    arguments: Callable[[int], dict[str, Any]] | None = None


Run = Callable[[Streams, range], Streams]
"""Runs a range of consecutive blocks."""


class Model(Protocol):
    """One architecture: its components, its tokens, and the way to run its blocks.

    Attributes:
        pipelines: diffusers' pipeline classes of this architecture.
    """

    @property
    def pipelines(self) -> tuple[type, ...]: ...  # noqa: D102

    def refusal(self, pipe: Pipeline) -> str | None:
        """Return the reason why fluxfire cannot work on a pipeline of these classes, or None."""
        ...

    def blocks(self, transformer: Transformer) -> list[nn.Module]:
        """Return the transformer's blocks in the order in which they run."""
        ...

    def attentions(self, transformer: Transformer) -> list[AttentionModule]:
        """Return the attentions of all blocks, in the order in which they run."""
        ...

    def linears(self, block: nn.Module) -> list[tuple[nn.Module, str]]:
        """Return a block's linear layers, each as (owner, name of the owner's attribute)."""
        ...

    def projections(self, attention: AttentionModule) -> list[tuple[str, tuple[str, str, str]]]:
        """Return an attention's projections to queries, keys and values.

        Returns:
            For each stream with projections of its own: diffusers' attribute name for the fused
            projection, and the attribute names of the three separate projections.
        """
        ...

    def modulated_norms(self, block: nn.Module) -> list[nn.Module]:
        """Return a block's norms that compute modulations, in the order in which they run."""
        ...

    def text_encoders(self, pipe: Pipeline) -> list[nn.Module]:
        """Return the text encoders of a pipeline."""
        ...

    def sigma(self, pipe: Pipeline) -> torch.Tensor:
        """Return the noise level of a pipeline's current step: float32, without dimensions."""
        ...

    def identity(self, inputs: dict[str, Any]) -> object | None:
        """Return an object that all transformer calls of one generation share.

        Args:
            inputs: keyword arguments of a transformer call.

        Returns:
            The object; None for a call that no pipeline made.
        """
        ...

    def tokens(self, inputs: dict[str, Any]) -> Tokens:
        """Count the tokens of a transformer call. Waits for the device."""
        ...

    def runner(self, transformer: Transformer, inputs: dict[str, Any]) -> Run:
        """Return a function that runs blocks exactly as diffusers does.

        Args:
            transformer: the transformer.
            inputs: keyword arguments of a transformer call. This removes the arguments that the
                function handles itself.
        """
        ...

    def mount(
        self, transformer: Transformer, stack: Callable[[Streams], Streams]
    ) -> AbstractContextManager[None]:
        """Make the transformer's forward call `stack` in place of its blocks, in a `with` block."""
        ...

    def unmount(self, transformer: Transformer) -> None:
        """Give a transformer its own blocks back, if an interrupt cut `mount` short."""
        ...

    def reference_size(self, pipe: Pipeline, width: int, height: int) -> tuple[int, int]:
        """Return the size (width, height) to which a pipeline resizes a reference by default."""
        ...

    def exact_size(self, width: int, height: int) -> dict[str, int]:
        """Return the arguments of a pipeline call for an output of exactly this size in pixels."""
        ...

    def size_multiple(self, pipe: Pipeline) -> int:
        """Return the number of pixels that both sides of every picture must be multiples of."""
        ...

    def is_tiny(self, pipe: Pipeline) -> bool:
        """Whether a pipeline's model is tiny, as in tests."""
        ...
