"""The fields of requests and answers, with their limits."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from fluxfire.serve.wire import STEPS, Level

_SCALE = Annotated[float, Field(ge=0, le=20, allow_inf_nan=False)]
_SIDE = Annotated[int, Field(ge=256, le=2048, multiple_of=16)]
_PIXEL = "data:image/png;base64,iVBORw0KGgo…"
LARGEST_SEED = 2**32 - 1
MOST_PIXELS = 1_100_000
"""Most pixels of a requested size. Kontext's own sizes have up to 1,062,400."""


def _refuse_blank(words: str) -> str:
    if not words.strip():
        raise ValueError("white space alone says nothing; write some words")
    return words


_WORDS = Annotated[
    str,
    Field(min_length=1, max_length=2000, json_schema_extra={"pattern": r"\S"}),
    AfterValidator(_refuse_blank),
]


class EditRequest(BaseModel):
    """An instruction and the picture to edit. Without a picture it is text to image."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"prompt": "make it night", "image": _PIXEL, "quality": "faithful", "seed": 7},
                {
                    "prompt": "A majestic dragon breathing rainbow fire",
                    "num_images": 1,
                    "width": 1024,
                    "height": 1024,
                    "steps": STEPS,
                },
            ]
        },
    )

    prompt: _WORDS = Field(description="What to do, or what to draw.")
    prompt2: _WORDS | None = Field(None, description="The prompt for T5, if different.")
    negative_prompt: _WORDS | None = Field(
        None,
        description="What the picture must not show. It needs a true_cfg_scale above 1.",
    )
    negative_prompt2: _WORDS | None = Field(
        None, description="The negative prompt for T5, if different."
    )
    image: str | None = Field(
        None, description="The picture: base64 or a data: URL; in a form, a file.", min_length=1
    )
    image_url: str | None = Field(
        None,
        description="The picture's URL: a data: URL, or https on a host that the service allows.",
        min_length=1,
    )
    seed: int | None = Field(None, ge=0, le=LARGEST_SEED, description="Random by default.")
    true_cfg_scale: _SCALE = Field(
        1.0,
        description="Strength of the negative prompt. Above 1 it needs a negative_prompt, and each "
        "step runs twice.",
    )
    guidance_scale: _SCALE | None = Field(
        None, description="The model's own by default, which is 3.5 for FLUX.1 Kontext."
    )
    width: _SIDE = Field(
        1024,
        description="Needs height. Together they are the aspect ratio, and the size if the model "
        f"allows it; they have at most {MOST_PIXELS} pixels. Without them, a picture keeps its "
        "aspect ratio.",
    )
    height: _SIDE = Field(1024, description="Needs width.")
    steps: int = Field(STEPS, ge=1, le=50)
    num_images: int = Field(1, ge=1, le=4)
    output_format: Literal["PNG", "JPG", "WEBP"] = "PNG"
    output_quality: int = Field(90, ge=1, le=100)
    quality: Level | None = Field(
        None,
        description="`faithful` computes every step; `balanced` and `fast` are lossy and skip "
        "some. `/about` says how many, and which quality is the default.",
    )

    @model_validator(mode="after")
    def _one_picture(self) -> Self:
        if self.image is not None and self.image_url is not None:
            raise ValueError("image and image_url exclude each other; give one of them")
        return self

    @model_validator(mode="after")
    def _both_sides(self) -> Self:
        for side, other in (("width", "height"), ("height", "width")):
            if side in self.model_fields_set and other not in self.model_fields_set:
                raise ValueError(f"{side} needs {other}; give both of them, or neither")
        if self.width * self.height > MOST_PIXELS:
            raise ValueError(
                f"width and height make {self.width * self.height} pixels; the limit is "
                f"{MOST_PIXELS}"
            )
        return self

    @model_validator(mode="after")
    def _both_of_guidance(self) -> Self:
        # The pipeline ignores each of them without the other.
        guided = self.true_cfg_scale > 1
        for name in ("negative_prompt", "negative_prompt2"):
            if getattr(self, name) is not None and not guided:
                raise ValueError(f"{name} needs a true_cfg_scale above 1; add one, such as 2")
        if guided and self.negative_prompt is None:
            raise ValueError("a true_cfg_scale above 1 needs a negative_prompt; add one")
        return self

    @property
    def size(self) -> tuple[int, int] | None:
        """The requested size; None without one, so that a picture keeps its aspect ratio."""
        return (self.width, self.height) if "width" in self.model_fields_set else None


class JobRequest(EditRequest):
    """An edit in the background."""

    webhook_url: str | None = Field(
        None,
        min_length=1,
        max_length=2000,
        description="Where the service posts the job when it has ended. Its host must be one that "
        "the service allows.",
    )


class ImageMade(BaseModel):
    """One picture."""

    data_url: str | None = Field(
        description="The picture itself, if the service stores no pictures."
    )
    url: str | None = Field(
        description="A link to the stored picture; it expires. It is an absolute URL if the "
        "service stores pictures in a bucket, or knows its own public URL. Otherwise it is a path "
        "of this service, such as /files/…."
    )
    filename: str
    filepath: str | None = Field(description="Name of the stored picture.")
    seed: int
    width: int
    height: int


class Timings(BaseModel):
    """Seconds of each phase."""

    waiting: float
    decoding: float
    inference: float
    encoding: float
    storing: float


class EditAnswer(BaseModel):
    """The pictures, and how the service made them."""

    images: list[ImageMade]
    seed: int = Field(
        description="Seed of the first picture; each further picture has the next seed."
    )
    quality: str = Field(description='The quality level, or "as applied".')
    steps: list[Literal["computed", "reused", "hit"]] = Field(
        description="What each denoising step skipped: nothing (computed), the reference (reused), "
        "or all blocks but the first (hit)."
    )
    hit_rate: float = Field(description="Share of steps that were hits.")
    warnings: list[str] = Field(
        description="What did not go as the request may expect, such as words that the model "
        "could not read."
    )
    inference_time: float = Field(description="Seconds in the pipeline.")
    processing_time: float = Field(description="Seconds to read and write pictures.")
    total_time: float = Field(description="Total seconds, including waiting.")
    timings: Timings


class Problem(BaseModel):
    """Why there is no result."""

    code: str
    message: str


class ProblemAnswer(BaseModel):
    """An error."""

    error: Problem


class JobAnswer(BaseModel):
    """The current state of a job."""

    id: str
    status: Literal["queued", "running", "done", "failed", "cancelled"]
    position: int | None = Field(
        description="Number of requests ahead of it in the queue; null if it is not queued."
    )
    step: int
    steps: int
    result: EditAnswer | None
    error: Problem | None


class Quality(BaseModel):
    """A quality that a request can ask for."""

    name: Level
    about: str = Field(description="What it does.")


class About(BaseModel):
    """The service."""

    model: str
    version: str
    state: Literal["starting", "ready", "stalled", "draining", "failed"]
    trouble: str | None = Field(
        None, description="Why the service has no pipeline; null if it has one."
    )
    device: str | None
    passes: list[str]
    qualities: list[Quality]
    quality: str | None = Field(
        description='The default quality; "as applied" if the passes match no level.'
    )
    key_required: bool
    max_pixels: int
    max_bytes: int
    default_steps: int


class Health(BaseModel):
    """Whether the service is alive."""

    status: Literal["starting", "ok", "stalled", "draining", "failed", "no-store"]
    gpu_available: bool
    message: str | None = None


def form_schema(model: type[EditRequest]) -> dict[str, Any]:
    """Return the schema of a request as a form, where the picture is a file."""
    schema = model.model_json_schema()
    schema.pop("examples", None)
    file = {"type": "string", "contentMediaType": "image/*", "description": "The picture."}
    schema["properties"] = {**schema["properties"], "image": file}
    return schema
