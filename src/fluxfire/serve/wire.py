"""What the server's process and its worker tell each other. Everything here can be pickled."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from PIL import Image

if TYPE_CHECKING:  # the server's process does without torch
    from fluxfire.reporting.statistics import StepKind

Level = Literal["faithful", "balanced", "fast"]
LEVELS: tuple[Level, ...] = ("faithful", "balanced", "fast")
STEPS = 28
"""How many steps an edit has, unless its request says otherwise."""
AS_APPLIED = "as applied"
"""The quality of passes that are set otherwise than any level."""


@dataclass(frozen=True, slots=True)
class RawPicture:
    """A picture's pixels: three bytes each, row by row."""

    width: int
    height: int
    data: bytes

    @classmethod
    def of(cls, picture: Image.Image) -> RawPicture:
        """Take a picture's pixels; it must be in RGB."""
        return cls(picture.width, picture.height, picture.tobytes())

    def picture(self) -> Image.Image:
        """Return them as a picture."""
        return Image.frombytes("RGB", (self.width, self.height), self.data)


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineRequest:
    """What one request asks of the pipeline; without a picture, to make one from text.

    Attributes:
        prompt: the instruction.
        prompt_2: the same for T5, if other words.
        negative_prompt: what to steer away from, under true CFG.
        negative_prompt_2: the same for T5, if other words.
        picture: the picture to edit.
        seeds: of each picture wanted.
        size: width and height that are wished for; None for the picture's shape.
        steps: denoising steps.
        guidance_scale: what the model is told.
        true_cfg_scale: above 1 and with a negative prompt, each step runs twice.
        level: the quality wanted; None for the service's own.
    """

    prompt: str
    prompt_2: str | None = None
    negative_prompt: str | None = None
    negative_prompt_2: str | None = None
    picture: RawPicture | None = None
    seeds: tuple[int, ...] = (0,)
    size: tuple[int, int] | None = None
    steps: int = STEPS
    guidance_scale: float = 3.5
    true_cfg_scale: float = 1.0
    level: Level | None = None

    @property
    def guided(self) -> bool:
        """Whether each step runs twice."""
        return self.true_cfg_scale > 1 and self.negative_prompt is not None

    @property
    def kind(self) -> Hashable:
        """What must be equal for two to be made at once."""
        picture = self.picture and (self.picture.width, self.picture.height)
        true_cfg = self.true_cfg_scale if self.guided else None
        return picture, self.size, self.steps, self.guidance_scale, true_cfg, self.level


@dataclass(frozen=True, slots=True)
class Result:
    """What was made of an ask.

    Attributes:
        pictures: one for each seed.
        steps: what was left out of each step, of all these pictures.
        hit_rate: the share of steps that were hits, over pictures.
    """

    pictures: tuple[RawPicture, ...]
    steps: tuple[StepKind, ...]
    hit_rate: float


@dataclass(frozen=True, slots=True)
class Facts:
    """What a worker tells of its pipeline.

    Attributes:
        model: as in the settings.
        device: where it runs.
        passes: what was applied, as text.
        levels: the qualities that these passes can give, and in words what each does.
        level: the quality that a request gets unless it asks for another, or `AS_APPLIED`.
    """

    model: str
    device: str
    passes: tuple[str, ...]
    levels: Mapping[Level, str]
    level: str


@dataclass(frozen=True, slots=True)
class Batch:
    """Asks of one kind, by ticket; no more than so many pictures at once."""

    asks: Mapping[int, PipelineRequest]
    at_once: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody waits for this ticket any more."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Stop:
    """End."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker takes batches."""

    facts: Facts


@dataclass(frozen=True, slots=True)
class CannotStart:
    """The worker cannot start, and another one could not either."""

    message: str


@dataclass(frozen=True, slots=True)
class StepDone:
    """A step of the batch was made."""

    step: int
    steps: int


@dataclass(frozen=True, slots=True)
class Done:
    """The batch is made, but for what was cancelled: results by ticket."""

    results: Mapping[int, Result]
    seconds: float


Reason = Literal["out-of-memory", "edit-refused", "edit-failed"]


@dataclass(frozen=True, slots=True)
class Failed:
    """The batch failed; the worker goes on."""

    reason: Reason
    message: str


ToWorker: TypeAlias = Batch | Cancel | Stop
FromWorker: TypeAlias = Ready | CannotStart | StepDone | Done | Failed
