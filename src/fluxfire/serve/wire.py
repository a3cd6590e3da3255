"""Messages between the server and its worker. All of them can be pickled."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from PIL import Image

if TYPE_CHECKING:  # the server process does not load torch
    from fluxfire.reporting.statistics import StepKind

Level = Literal["faithful", "balanced", "fast"]
LEVELS: tuple[Level, ...] = ("faithful", "balanced", "fast")
HEARTBEAT = 2.0
"""Seconds between two signs of life of a worker."""
STEPS = 28
"""Default number of denoising steps."""
AS_APPLIED = "as applied"
"""The quality of passes whose settings match no level."""


@dataclass(frozen=True, slots=True)
class RawPicture:
    """A picture's pixels: three bytes each, row by row."""

    width: int
    height: int
    data: bytes

    @classmethod
    def of(cls, picture: Image.Image) -> RawPicture:
        """Copy the pixels of a picture, which must be in RGB."""
        return cls(picture.width, picture.height, picture.tobytes())

    def picture(self) -> Image.Image:
        """Return the pixels as a picture."""
        return Image.frombytes("RGB", (self.width, self.height), self.data)


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineRequest:
    """One request to the pipeline; without a picture it is text to image.

    Attributes:
        prompt: the instruction.
        prompt_2: the instruction for T5, if different.
        negative_prompt: what the picture must not show, under true CFG.
        negative_prompt_2: the negative prompt for T5, if different.
        picture: the picture to edit.
        seeds: a seed for each picture.
        size: wanted width and height; None for the picture's aspect ratio.
        steps: denoising steps.
        guidance_scale: the distilled guidance, an input of the model; None for its default.
        true_cfg_scale: above 1 and with a negative prompt, each step runs twice.
        level: the requested quality; None for the service's own.
    """

    prompt: str
    prompt_2: str | None = None
    negative_prompt: str | None = None
    negative_prompt_2: str | None = None
    picture: RawPicture | None = None
    seeds: tuple[int, ...] = (0,)
    size: tuple[int, int] | None = None
    steps: int = STEPS
    guidance_scale: float | None = None
    true_cfg_scale: float = 1.0
    level: Level | None = None

    @property
    def guided(self) -> bool:
        """Whether true CFG runs each step twice."""
        return self.true_cfg_scale > 1 and self.negative_prompt is not None

    @property
    def kind(self) -> Hashable:
        """Everything that must be equal for two requests to share a batch."""
        picture = self.picture and (self.picture.width, self.picture.height)
        true_cfg = self.true_cfg_scale if self.guided else None
        return picture, self.size, self.steps, self.guidance_scale, true_cfg, self.level


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a request.

    Attributes:
        pictures: one for each seed.
        steps: for each step, what all of these pictures skipped in it.
        hit_rate: share of steps that were hits, over all pictures.
        warnings: what the client should know, without its own words.
    """

    pictures: tuple[RawPicture, ...]
    steps: tuple[StepKind, ...]
    hit_rate: float
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Facts:
    """A worker's description of its pipeline.

    Attributes:
        model: the settings' model.
        device: the pipeline's device.
        passes: the applied passes, as text.
        levels: the qualities that these passes can give, each with a description.
        level: the default quality of a request, or `AS_APPLIED`.
    """

    model: str
    device: str
    passes: tuple[str, ...]
    levels: Mapping[Level, str]
    level: str


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests of one kind, by ticket number, with the batch size."""

    requests: Mapping[int, PipelineRequest]
    at_once: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """The request of this ticket was cancelled."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Stop:
    """The server asks the worker to stop."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker is ready for batches."""

    facts: Facts


@dataclass(frozen=True, slots=True)
class Alive:
    """The worker's process runs. It says so every `HEARTBEAT` seconds once it is ready.

    Attributes:
        gpu_bytes: the GPU's memory in bytes: `allocated` to tensors, `reserved` by torch, and the
            `total`. Empty without a GPU.
    """

    gpu_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CannotStart:
    """The worker cannot start, and another worker could not either."""

    message: str


@dataclass(frozen=True, slots=True)
class StepDone:
    """The worker finished a step of the batch."""

    step: int
    steps: int


@dataclass(frozen=True, slots=True)
class Done:
    """The batch is done: results by ticket number, without cancelled requests."""

    results: Mapping[int, Result]
    seconds: float


Reason = Literal["out-of-memory", "edit-refused", "edit-failed"]


@dataclass(frozen=True, slots=True)
class Failed:
    """The batch failed; the worker continues.

    Attributes:
        reason: a short word for programs.
        message: what the client is told.
        details: what only the log is told, such as a traceback.
    """

    reason: Reason
    message: str
    details: str = ""


ToWorker: TypeAlias = Batch | Cancel | Stop
FromWorker: TypeAlias = Ready | Alive | CannotStart | StepDone | Done | Failed
