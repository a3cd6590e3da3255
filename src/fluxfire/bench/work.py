"""Computed work of an edit in full steps, to compare methods at equal work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import ceil
from typing import Any, Self

from torch import nn

from fluxfire.diffusers_types import Pipeline
from fluxfire.edits.override import CALL_SLOT
from fluxfire.model import Tokens
from fluxfire.reporting.statistics import RunStatistics, StepKind
from fluxfire.supported import model_of

_ROUNDING = 1e-6
_STREAM = 3  # dimensions of a stream: (batch, tokens, width)


@dataclass(frozen=True)
class Work:
    """The computed work of one edit.

    Attributes:
        steps: work in full steps. A step that runs only the first of FLUX's 57 blocks counts 1/57;
            a step that skips the reference counts its share of the tokens.
        skipped: number of steps that did not run all blocks on all tokens.
    """

    steps: float
    skipped: int


def work_of_run(run: RunStatistics, blocks: int) -> Work:
    """Count the work of a generation from its statistics.

    Example: 28 steps at 1024 x 1024, 12 of them hits, are 16 + 12 / 57 = 16.2 steps of work.

    Args:
        run: statistics of the generation.
        blocks: number of blocks of the transformer.
    """
    return work_of_steps(run.step_kinds, run.tokens, blocks)


def work_of_steps(kinds: Sequence[StepKind], tokens: Tokens | None, blocks: int) -> Work:
    """Count the work of steps by their kinds.

    Args:
        kinds: the kind of each step.
        tokens: tokens of a transformer call; None if nothing ran.
        blocks: number of blocks of the transformer.
    """
    share = {"computed": 1.0, "hit": 1 / blocks, "reused": 1.0}
    if tokens is not None:
        kept = tokens.noise + tokens.text
        share["reused"] = kept / (kept + tokens.reference)
    return Work(sum(share[kind] for kind in kinds), kinds.count("hit"))


def equal_steps(work: float, step_cost: float = 1.0) -> int:
    """Return the number of plain steps of equal work, rounded up in plain's favour.

    Args:
        work: the work in full steps.
        step_cost: seconds of a full step divided by seconds of a plain step; below 1 for a method
            that makes each step cheaper, such as eight-bit weights.
    """
    return max(1, ceil(work * step_cost - _ROUNDING))


class BlockCounter:
    """Counts how many tokens run through each block, for a library that does not report its work.

    It counts at calls of each block from outside, so that a compiled block stays one graph and
    `FusedBlocks` sees no hook. If a diffusers hook replaced a block's forward, the hook may skip
    the block, so the counter counts calls of the block's first norm. A context manager.
    """

    def __init__(self, pipe: Pipeline) -> None:
        self._model = model_of(pipe)
        self._blocks = self._model.blocks(pipe.transformer)
        self._tokens: list[list[int]] = [[] for _ in self._blocks]
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        """Start counting."""
        for index, block in enumerate(self._blocks):
            if "forward" in vars(block):
                norm, *_ = self._model.modulated_norms(block)
                self._undo.callback(
                    norm.register_forward_pre_hook(
                        self._counting_hook(index), with_kwargs=True
                    ).remove
                )
            else:
                self._undo.callback(self._watch(index, block))
        return self

    def __exit__(self, *_: object) -> None:
        """Stop counting, and restore the blocks."""
        self._undo.close()

    def work(self, steps: int) -> Work:
        """Return the counted work. A run on half of the tokens counts half.

        Args:
            steps: number of steps of the edit.
        """
        full = [max(runs, default=1) for runs in self._tokens]
        shares = [sum(runs) / most for runs, most in zip(self._tokens, full, strict=True)]
        whole = [runs.count(most) for runs, most in zip(self._tokens, full, strict=True)]
        return Work(sum(shares) / len(shares), max(0, steps - min(whole)))

    def _counting_hook(self, index: int) -> Callable[..., None]:
        def count_run(_: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            self._tokens[index].append(_count_tokens(args, kwargs))

        return count_run

    def _watch(self, index: int, block: nn.Module) -> Callable[[], None]:
        """Count the calls of a block, compiled or not; return a function that stops it."""
        own: dict[str, Any] = vars(block)
        before, count_run = own.get(CALL_SLOT), self._counting_hook(index)
        run = before or block._call_impl  # noqa: SLF001 - what torch.nn.Module.__call__ runs

        def call(*args: Any, **kwargs: Any) -> Any:
            count_run(block, args, kwargs)
            return run(*args, **kwargs)

        def stop() -> None:
            if before is None:
                del own[CALL_SLOT]
            else:
                own[CALL_SLOT] = before

        own[CALL_SLOT] = call
        return stop


def _count_tokens(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Return the tokens of a block's call: those of its image stream, and of its text if given.

    Args:
        args: of the call; the image stream first, (batch, tokens, width), then the text.
        kwargs: of the call.
    """
    named = [kwargs.get(name) for name in ("hidden_states", "encoder_hidden_states")]
    streams = [s for s in (*args[:2], *named) if getattr(s, "ndim", 0) == _STREAM]
    return sum(s.shape[1] for s in streams) or 1  # a call that shows no stream counts as a run
