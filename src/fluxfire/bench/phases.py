"""Measures the phases of a generation, including those outside the denoising loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from fluxfire.diffusers_types import Pipeline
from fluxfire.reporting.device_events import DeviceClock
from fluxfire.runtime.generation import only_watches


class Phases:
    """Seconds of each phase, summed over the generations in a `phases` block."""

    def __init__(self, pipe: Pipeline) -> None:
        self._clock = DeviceClock(pipe._execution_device)  # noqa: SLF001 - the only right device under offloading
        self._spans: dict[str, list[tuple[Callable[[], float], Callable[[], float]]]] = {}

    def seconds(self) -> dict[str, float]:
        """Return each phase's total seconds; waits for the device."""
        return {name: sum(end() - begin() for begin, end in of) for name, of in self._spans.items()}

    def bracket(self, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that calls `plain` and records the time of the call."""

        def with_span(*args: Any, **kwargs: Any) -> Any:
            begin = self._clock.mark()
            try:
                return plain(*args, **kwargs)
            finally:
                self._spans.setdefault(name, []).append((begin, self._clock.mark()))

        return only_watches(with_span)


@contextmanager
def phases(pipe: Pipeline) -> Iterator[Phases]:
    """Measure the phases of a pipeline's generations in a `with` block.

    It overrides the phases' methods on the instance, and removes the overrides afterwards.
    """
    recorder = Phases(pipe)
    with ExitStack() as undo:
        for name, owner, method in (
            ("text encoding", pipe, "encode_prompt"),
            ("reference encoding", pipe.vae, "encode"),
            ("decoding", pipe.vae, "decode"),
        ):
            undo.enter_context(_override(owner, method, recorder, name))
        yield recorder


@contextmanager
def _override(owner: object, method: str, recorder: Phases, name: str) -> Iterator[None]:
    present = vars(owner)
    had, before = method in present, present.get(method)
    present[method] = recorder.bracket(name, getattr(owner, method))
    try:
        yield
    finally:
        if had:
            present[method] = before
        else:
            del present[method]
