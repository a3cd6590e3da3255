"""What fluxfire raises."""

from __future__ import annotations

from typing import Any

__all__ = [
    "BenchError",
    "BusyError",
    "ExampleError",
    "FluxfireError",
    "FluxfireWarning",
    "LoadError",
    "MegaCacheWarning",
    "PassError",
    "PictureError",
    "PlanError",
    "RestoreError",
]


class FluxfireError(Exception):
    """Base of every error that fluxfire raises on purpose."""


class PlanError(FluxfireError):
    """fluxfire cannot do what was asked; nothing was changed.

    Attributes:
        suggestion: passes that could be applied instead; empty if fluxfire found none.
    """

    def __init__(self, message: str, *, suggestion: tuple[Any, ...] = ()) -> None:
        super().__init__(message)
        self.suggestion = suggestion


class PassError(FluxfireError):
    """A pass failed while it was being applied; everything was rolled back.

    Attributes:
        pass_name: name of the pass that failed. `__cause__` is the pass's own error.
    """

    def __init__(self, message: str, *, pass_name: str) -> None:
        super().__init__(message)
        self.pass_name = pass_name


class BusyError(FluxfireError):
    """The pipeline is busy: it generates, or another thread changes it."""


class RestoreError(FluxfireError):
    """Some edits could not be undone; all others were.

    Attributes:
        failures: the exceptions of the failed edits, in the order of undoing.
    """

    def __init__(self, message: str, *, failures: tuple[Exception, ...]) -> None:
        super().__init__(message)
        self.failures = failures


class LoadError(FluxfireError):
    """A pipeline could not be loaded; the message says what to do."""


class BenchError(FluxfireError):
    """Measuring is impossible: examples or a budget are invalid, or the device is missing."""


class PictureError(FluxfireError):
    """A picture cannot be read; the message names the file."""


class ExampleError(BenchError):
    """A file of examples cannot be read; the message names the line."""


class FluxfireWarning(UserWarning):
    """A warning about a pass; fluxfire applies the pass anyway."""


class MegaCacheWarning(FluxfireWarning):
    """A file of compiled artifacts was not used, or not written; the pipeline works without it."""
