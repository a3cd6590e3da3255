"""How much of an edit was computed, in steps: what a method must be compared at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import ceil
from typing import Any, Self

from torch import nn

from fluxfire.edits.override import CALL_SLOT
from fluxfire.model import Tokens
from fluxfire.reporting.statistics import RunStatistics, StepKind
from fluxfire.supported import model_of

_ROUNDING = 1e-6


@dataclass(frozen=True)
class Work:
    """What one edit computed.

    Attributes:
        steps: computed work, counted in full steps. A step that only runs the first of FLUX's 57
            blocks counts 1/57; a step that leaves the reference out counts its share of tokens.
        skipped: number of steps that did not run all blocks.
    """

    steps: float
    skipped: int


def of_run(run: RunStatistics, blocks: int) -> Work:
    """Count the work of a generation from its statistics.

    Example: 28 steps at 1024 x 1024, 12 of them hits, are 16 + 12 / 57 = 16.2 steps of work.

    Args:
        run: the generation.
        blocks: how many blocks the transformer has.
    """
    return of_kinds(run.step_kinds, run.tokens, blocks)


def of_kinds(kinds: Sequence[StepKind], tokens: Tokens | None, blocks: int) -> Work:
    """Count the work of steps by their kinds.

    Args:
        kinds: of each step, what a cache left out.
        tokens: of a call of the transformer; None if nothing ran.
        blocks: how many blocks the transformer has.
    """
    share = {"computed": 1.0, "hit": 1 / blocks, "reused": 1.0}
    if tokens is not None:
        kept = tokens.noise + tokens.text
        share["reused"] = kept / (kept + tokens.reference)
    return Work(sum(share[kind] for kind in kinds), kinds.count("hit"))


def equal_steps(work: float, step_cost: float = 1.0) -> int:
    """Return how many plain steps are as much work, rounded up in the plain pipeline's favour.

    Args:
        work: in full steps.
        step_cost: seconds of a full step over those of a plain one; below 1 for a method that
            makes each step cheaper, such as eight-bit weights.
    """
    return max(1, ceil(work * step_cost - _ROUNDING))


class BlockCounter:
    """Counts how often each block runs: the work of a library that does not report it.

    It counts the calls of each block from outside, so that a compiled block stays one graph and
    `FusedBlocks` sees no hook. Only where a hook of diffusers replaced a block's forward, and may
    skip what is inside, it counts the calls of the block's first norm. A context manager.
    """

    def __init__(self, pipe: Any) -> None:
        self._model = model_of(pipe)
        self._blocks = self._model.blocks(pipe.transformer)
        self._runs = [0] * len(self._blocks)
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        """Begin to count."""
        for index, block in enumerate(self._blocks):
            if "forward" in vars(block):
                norm, *_ = self._model.modulated_norms(block)
                self._undo.callback(norm.register_forward_pre_hook(self._seen(index)).remove)
            else:
                self._undo.callback(self._watch(index, block))
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the blocks as they were."""
        self._undo.close()

    def work(self, steps: int) -> Work:
        """Return what was counted.

        Args:
            steps: how many steps the edit had.
        """
        return Work(sum(self._runs) / len(self._runs), max(0, steps - min(self._runs)))

    def _seen(self, index: int) -> Callable[..., None]:
        def seen(*_: object) -> None:
            self._runs[index] += 1

        return seen

    def _watch(self, index: int, block: nn.Module) -> Callable[[], None]:
        """Count the calls of a block, compiled or not; return how to stop."""
        own: dict[str, Any] = vars(block)
        before, seen = own.get(CALL_SLOT), self._seen(index)
        run = before or block._call_impl  # noqa: SLF001 - what torch.nn.Module.__call__ runs

        def call(*args: Any, **kwargs: Any) -> Any:
            seen()
            return run(*args, **kwargs)

        def stop() -> None:
            if before is None:
                del own[CALL_SLOT]
            else:
                own[CALL_SLOT] = before

        own[CALL_SLOT] = call
        return stop
