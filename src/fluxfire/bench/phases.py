"""Where the time of one generation goes, outside the denoising loop too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from fluxfire.reporting.device_events import Marks


class Phases:
    """Seconds of each phase, over the generations made while they were watched."""

    def __init__(self, pipe: Any) -> None:
        self._marks = Marks(pipe._execution_device)  # noqa: SLF001 - the one truth under offloading
        self._spans: dict[str, list[tuple[Callable[[], float], Callable[[], float]]]] = {}

    def seconds(self) -> dict[str, float]:
        """Return each phase's total; waits for the device."""
        return {name: sum(end() - begin() for begin, end in of) for name, of in self._spans.items()}

    def bracket(self, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        """Make a function that does what the plain one does, and notes when."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = self._marks.now()
            try:
                return plain(*args, **kwargs)
            finally:
                self._spans.setdefault(name, []).append((begin, self._marks.now()))

        return timed


@contextmanager
def phases(pipe: Any) -> Iterator[Phases]:
    """Watch a pipeline's generations for the length of a `with` block.

    The methods that make up its phases are shadowed on the instance, and come back after.
    """
    watched = Phases(pipe)
    with ExitStack() as undo:
        for name, owner, method in (
            ("text encoding", pipe, "encode_prompt"),
            ("reference encoding", pipe.vae, "encode"),
            ("decoding", pipe.vae, "decode"),
        ):
            undo.enter_context(_shadowed(owner, method, watched, name))
        yield watched


@contextmanager
def _shadowed(owner: Any, method: str, watched: Phases, name: str) -> Iterator[None]:
    present = vars(owner)
    had, before = method in present, present.get(method)
    present[method] = watched.bracket(name, getattr(owner, method))
    try:
        yield
    finally:
        if had:
            present[method] = before
        else:
            del present[method]
