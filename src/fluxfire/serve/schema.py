"""The fields of requests and answers, with their bounds."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fluxfire.serve.wire import STEPS, Level

_SCALE = Annotated[float, Field(ge=0, le=20, allow_inf_nan=False)]
_SIDE = Annotated[int, Field(ge=256, le=1024, multiple_of=16)]
_WORDS = Annotated[str, Field(min_length=1, max_length=2000)]
_PIXEL = "data:image/png;base64,iVBORw0KGgo…"
LARGEST_SEED = 2**32 - 1


class EditRequest(BaseModel):
    """An instruction, and the picture to carry it out on; without a picture, one is made."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"prompt": "make it night", "image": _PIXEL, "quality": "faithful", "seed": 7},
                {
                    "prompt": "A majestic dragon breathing rainbow fire",
                    "num_images": 1, "width": 1024, "height": 1024, "steps": STEPS,
                },
            ]
        },
    )  # fmt: skip

    prompt: _WORDS = Field(description="What to do, or what to draw.")
    prompt2: _WORDS | None = Field(None, description="The same for T5, if other words.")
    negative_prompt: _WORDS | None = Field(
        None, description="What to steer away from, where true_cfg_scale is above 1."
    )
    negative_prompt2: _WORDS | None = Field(None, description="The same for T5.")
    image: str | None = Field(
        None, description="The picture: base64 or a data: URL; in a form, a file.", min_length=1
    )
    image_url: str | None = Field(
        None,
        description="Or where it is: a data: URL, or https on a host that the service allows.",
        min_length=1,
    )
    seed: int | None = Field(None, ge=0, le=LARGEST_SEED, description="Drawn if not given.")
    true_cfg_scale: _SCALE = 1.0
    guidance_scale: _SCALE = 3.5
    width: _SIDE = Field(
        1024, description="With height: the shape wanted, and a wish for the size."
    )
    height: _SIDE = 1024
    steps: int = Field(STEPS, ge=1, le=50)
    num_images: int = Field(1, ge=1, le=4)
    output_format: Literal["PNG", "JPG", "WEBP"] = "PNG"
    output_quality: int = Field(90, ge=1, le=100)
    quality: Level | None = Field(
        None,
        description="`faithful` computes every step; `balanced` and `fast` are lossy and skip "
        "some. `/about` says how many, and which quality a request gets that names none.",
    )

    @model_validator(mode="after")
    def _one_picture(self) -> Self:
        if self.image is not None and self.image_url is not None:
            raise ValueError("image and image_url exclude each other; give one of them")
        return self

    @property
    def size(self) -> tuple[int, int] | None:
        """The size wished for; None if none was, so that a picture keeps its own shape."""
        asked = {"width", "height"} & self.model_fields_set
        return (self.width, self.height) if asked else None


class ImageMade(BaseModel):
    """One picture."""

    data_url: str | None = Field(description="The picture itself, unless the service stores it.")
    url: str | None = Field(description="A link to it, which expires, if the service stores it.")
    filename: str
    filepath: str | None = Field(description="Its name in the store.")
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
    """The pictures made, and what it took."""

    images: list[ImageMade]
    seed: int = Field(description="Of the first picture; each further one has the next.")
    quality: str = Field(description='The level given, or "as applied".')
    steps: list[Literal["computed", "reused", "hit"]] = Field(
        description="What was left out of each denoising step: nothing, the reference, or all "
        "blocks but the first."
    )
    hit_rate: float = Field(description="The share of steps that were hits.")
    inference_time: float = Field(description="Seconds in the pipeline.")
    processing_time: float = Field(description="Seconds to read and write pictures.")
    total_time: float = Field(description="Seconds in all, waiting included.")
    timings: Timings


class Problem(BaseModel):
    """Why there is no answer."""

    code: str
    message: str


class ProblemAnswer(BaseModel):
    """An error."""

    error: Problem


class JobAnswer(BaseModel):
    """A job, as it is now."""

    id: str
    status: Literal["queued", "running", "done", "failed", "cancelled"]
    position: int | None = Field(description="How many wait before it, while it is queued.")
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
    state: Literal["starting", "ready", "draining", "failed"]
    trouble: str | None = Field(None, description="Why there is no pipeline, if so.")
    device: str | None
    passes: list[str]
    qualities: list[Quality]
    quality: str | None = Field(
        description='What a request gets unless it asks for another; perhaps "as applied".'
    )
    key_required: bool
    max_pixels: int
    max_bytes: int
    default_steps: int


class Health(BaseModel):
    """Whether the service lives."""

    status: Literal["starting", "ok", "draining", "failed"]
    gpu_available: bool
    message: str | None = None


def form_schema() -> dict[str, Any]:
    """The schema of the same fields in a form, where the picture is a file."""
    schema = EditRequest.model_json_schema()
    schema.pop("examples", None)
    file = {"type": "string", "contentMediaType": "image/*", "description": "The picture."}
    schema["properties"] = {**schema["properties"], "image": file}
    return schema
