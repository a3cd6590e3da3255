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
    """The request cannot be carried out; nothing was changed.

    Attributes:
        suggestion: passes that could be applied instead; nothing where none are known.
    """

    def __init__(self, message: str, *, suggestion: tuple[Any, ...] = ()) -> None:
        super().__init__(message)
        self.suggestion = suggestion


class PassError(FluxfireError):
    """A pass failed while it was being applied; everything was rolled back.

    Attributes:
        pass_name: name of the pass that failed. The cause is chained.
    """

    def __init__(self, message: str, *, pass_name: str) -> None:
        super().__init__(message)
        self.pass_name = pass_name


class BusyError(FluxfireError):
    """The pipeline is generating, and what was asked for needs it idle."""


class RestoreError(FluxfireError):
    """Some edits could not be taken back; all the others were.

    Attributes:
        failures: what each failed inverse raised, in the order of undoing.
    """

    def __init__(self, message: str, *, failures: tuple[Exception, ...]) -> None:
        super().__init__(message)
        self.failures = failures


class LoadError(FluxfireError):
    """A pipeline could not be loaded; the message says what to do."""


class BenchError(FluxfireError):
    """Nothing can be measured so: examples or a budget that make no sense, or no such device."""


class PictureError(FluxfireError):
    """A picture cannot be read; the message names the file."""


class ExampleError(BenchError):
    """A file of examples cannot be read; the message names the line."""


class FluxfireWarning(UserWarning):
    """A pass is applied, and something about it is worth knowing."""


class MegaCacheWarning(FluxfireWarning):
    """A file of compiled artifacts was not used, or not written; the pipeline goes on without."""
