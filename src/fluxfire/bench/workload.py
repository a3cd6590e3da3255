"""Workloads: size and number of steps of edits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from fluxfire.bench.examples import Example
from fluxfire.diffusers_types import DiffusersPipeline
from fluxfire.errors import BenchError
from fluxfire.supported import model_of

_TINY_SIZE = (128, 128)
_OF_EXAMPLE, _OF_SIZE = "it comes from each example", "use Workload(size=(width, height))"
_ONE_PICTURE = "each edit makes one picture"
_SET_ELSEWHERE = {
    "prompt": _OF_EXAMPLE,
    "prompt_2": _OF_EXAMPLE,
    "prompt_embeds": _OF_EXAMPLE,
    "pooled_prompt_embeds": _OF_EXAMPLE,
    "image": _OF_EXAMPLE,
    "num_inference_steps": "use Workload(steps=…)",
    "sigmas": "they would fix the number of steps, and fewer steps are measured too",
    "timesteps": "they would fix the number of steps, and fewer steps are measured too",
    "generator": "each example has a seed of its own",
    "latents": "each example has a seed of its own",
    "width": _OF_SIZE,
    "height": _OF_SIZE,
    "max_area": _OF_SIZE,
    "_auto_resize": "use Workload(auto_resize=…)",
    "max_sequence_length": "use Workload(text_tokens=…)",
    "num_images_per_prompt": _ONE_PICTURE,
    "output_type": _ONE_PICTURE,
    "return_dict": _ONE_PICTURE,
}
"""Arguments of a call that a workload sets or fixes, and what to do instead."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Size and number of steps of an edit.

    Attributes:
        name: its name in results.
        steps: number of denoising steps.
        size: exact output width and height in pixels; None for the pipeline's default for the
            example's picture.
        auto_resize: whether Kontext resizes the reference to about a megapixel, as it does by
            default, whatever the output's size.
        text_tokens: padded length of the prompt; None for the pipeline's default.
        reference: True to edit the example's picture, False for text to image.
        call: other arguments of the pipeline's call, such as `{"true_cfg_scale": 2.0,
            "negative_prompt": "blurry"}`. They are written into results, so JSON must be able to
            hold them.

    Raises:
        BenchError: `call` has an argument that the workload sets itself, or one that JSON cannot
            hold.
    """

    name: str
    steps: int = 28
    size: tuple[int, int] | None = None
    auto_resize: bool = True
    text_tokens: int | None = None
    reference: bool = True
    call: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        call = dict(self.call)
        if taken := sorted(call.keys() & _SET_ELSEWHERE.keys()):
            name = taken[0]
            raise BenchError(f"Workload(call=…) cannot have {name}: {_SET_ELSEWHERE[name]}")
        for name, value in call.items():
            try:
                json.dumps(value)
            except (TypeError, ValueError) as error:
                raise BenchError(
                    f"Workload(call=…) cannot have {name}={type(value).__name__}(…), which no "
                    f"result could hold: {error}"
                ) from None
        object.__setattr__(self, "call", call)

    @classmethod
    def for_pipeline(
        cls,
        pipe: DiffusersPipeline,
        *,
        steps: int = 28,
        size: tuple[int, int] | None = None,
        call: Mapping[str, Any] | None = None,
    ) -> Workload:
        """Return a pipeline's default workload: its own size, or a small size if it is tiny.

        Args:
            pipe: the pipeline.
            steps: number of denoising steps.
            size: exact output width and height in pixels.
            call: other arguments of the pipeline's call.
        """
        name = f"{f'{size[0]} x {size[1]}' if size else 'edit'}{_in_steps(steps)}"
        call = call or {}
        if model_of(pipe).is_tiny(
            pipe
        ):  # its patches are small: a megapixel has so many of them that an edit takes minutes
            size = size or _TINY_SIZE
            return cls(
                name=name, steps=steps, size=size, auto_resize=False, text_tokens=32, call=call
            )
        return cls(name=name, steps=steps, size=size, call=call)

    @property
    def name_without_steps(self) -> str:
        """Its name, for an edit with another number of steps than this workload's."""
        return self.name.removesuffix(_in_steps(self.steps))

    def output_size(self, pipe: DiffusersPipeline, example: Example) -> tuple[int, int] | None:
        """Return the output's width and height; None for the pipeline's default."""
        if self.size is not None or example.picture is None or not self.reference:
            return self.size
        return model_of(pipe).reference_size(pipe, *example.picture.size)

    def of_each_size(self, pipe: DiffusersPipeline, examples: Sequence[Example]) -> list[Example]:
        """Return the first example of each size of output and reference, as each may compile."""
        first: dict[object, Example] = {}
        for example in examples:
            picture, resized = example.picture, None
            if picture is not None and self.reference and self.auto_resize:
                resized = model_of(pipe).reference_size(pipe, *picture.size)
            key = self.output_size(pipe, example), picture is None, resized
            first.setdefault(key, example)
        return list(first.values())

    def run(
        self,
        pipe: DiffusersPipeline,
        example: Example,
        *,
        seed: int = 0,
        steps: int | None = None,
    ) -> Image.Image:
        """Make one picture.

        Args:
            pipe: the pipeline.
            example: the example to edit.
            seed: seed of the noise.
            steps: number of denoising steps; None for the workload's.

        Returns:
            The picture.
        """
        picture = example.picture if self.reference else None
        call: dict[str, Any] = dict(self.call)
        size = self.output_size(pipe, example)
        if picture is not None and size is not None and not self.auto_resize:
            picture = picture.resize(size, Image.Resampling.LANCZOS)
            call["_auto_resize"] = False
        if size is not None:
            call |= model_of(pipe).exact_size(*size)
        if self.text_tokens is not None:
            call["max_sequence_length"] = self.text_tokens
        made: Image.Image = pipe(
            image=picture,
            prompt=example.instruction,
            num_inference_steps=steps or self.steps,
            generator=torch.Generator().manual_seed(seed),
            **call,
        ).images[0]
        return made


def _in_steps(steps: int) -> str:
    return f", {steps} steps"
