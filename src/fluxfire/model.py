"""What fluxfire asks of a model architecture. `kontext/` answers for FLUX.1 Kontext.

Everything above this file works on a `Model`, and so would on another architecture that answers
the same questions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class Tokens:
    """How many tokens of each kind a transformer call carries.

    The image stream is `noise` tokens followed by `reference` tokens; only the noise
    tokens of the output are used. The text stream has `text` tokens.
    """

    noise: int
    reference: int
    text: int


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call of the transformer within a generation.

    Attributes:
        step: denoising step, counted from 0.
        steps: how many steps the generation plans.
        branch: `"cond"`, or `"uncond"` for the second call of a step under true CFG.
        timestep: (batch,), in [0, 1]; a tensor, so that it can enter compiled code. In the
            latents' dtype: bfloat16 rounds it by up to a step's length.
        sigma: the noise level in float32, a tensor of no dimensions.
        tokens: how many tokens of each kind.
    """

    step: int
    steps: int
    branch: str
    timestep: torch.Tensor
    sigma: torch.Tensor
    tokens: Tokens


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
        arguments: a function that returns more attention arguments for a block, by its index.
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
    """One architecture: its parts, its tokens, and how its blocks run.

    Attributes:
        pipelines: the diffusers classes of its pipelines.
    """

    @property
    def pipelines(self) -> tuple[type, ...]: ...  # noqa: D102

    def refusal(self, pipe: Any) -> str | None:
        """Say why fluxfire cannot work on one of these pipelines, or None if it can."""
        ...

    def blocks(self, transformer: Any) -> list[nn.Module]:
        """Return the transformer's blocks in the order they run."""
        ...

    def attentions(self, transformer: Any) -> list[Any]:
        """Return the blocks' attentions, in the same order."""
        ...

    def linears(self, block: Any) -> list[tuple[Any, str]]:
        """Return where a block's matrix products are: (owner, name of the owner's attribute)."""
        ...

    def projections(self, attention: Any) -> list[tuple[str, tuple[str, str, str]]]:
        """Return an attention's projections to queries, keys and values.

        Returns:
            For each stream of its own, the name that diffusers gives the fused projection, and the
            names of the three.
        """
        ...

    def modulated_norms(self, block: Any) -> list[Any]:
        """Return a block's norms that compute modulations, the first to run first."""
        ...

    def text_encoders(self, pipe: Any) -> list[nn.Module]:
        """Return the text encoders that a pipeline has."""
        ...

    def sigma(self, pipe: Any) -> torch.Tensor:
        """Return the noise level of the step that a pipeline is at: float32, no dimensions."""
        ...

    def identity(self, inputs: dict[str, Any]) -> object | None:
        """Return an object that all transformer calls of one generation share.

        Args:
            inputs: keyword arguments of a transformer call.

        Returns:
            None for a call that no pipeline made.
        """
        ...

    def tokens(self, inputs: dict[str, Any]) -> Tokens:
        """Count the tokens of a transformer call. Waits for the device."""
        ...

    def runner(self, transformer: Any, inputs: dict[str, Any]) -> Run:
        """Return a function that runs blocks exactly as diffusers does.

        Args:
            transformer: the model.
            inputs: keyword arguments of a call; what the runner sees to itself is taken out.
        """
        ...

    def mount(
        self, transformer: Any, stack: Callable[[Streams], Streams]
    ) -> AbstractContextManager[None]:
        """Have the transformer's forward call `stack` where it would run its blocks."""
        ...

    def unmount(self, transformer: Any) -> None:
        """Give a transformer its blocks back; an interrupt may have kept `mount` from doing so."""
        ...

    def reference_size(self, pipe: Any, width: int, height: int) -> tuple[int, int]:
        """Return the size (width, height) to which a pipeline resizes a reference by default."""
        ...

    def exact_size(self, width: int, height: int) -> dict[str, int]:
        """Return the arguments of a pipeline call for an output of exactly this size, in pixels."""
        ...

    def size_multiple(self, pipe: Any) -> int:
        """Return what the sides of a pipeline's pictures are multiples of, in pixels."""
        ...

    def is_tiny(self, pipe: Any) -> bool:
        """Whether a pipeline is a small one, as those of tests are."""
        ...
