"""Turns requests into pipeline calls; requests of one kind share a call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from PIL import Image

from fluxfire import api
from fluxfire.diffusers_types import Pipeline
from fluxfire.protocol import Pass
from fluxfire.reporting.statistics import StepKind
from fluxfire.runtime.generation import only_watches
from fluxfire.serve.quality_levels import current_level, describe_level, settings_by_level
from fluxfire.serve.wire import Facts, Level, PipelineRequest, RawPicture, Result
from fluxfire.supported import model_of
from fluxfire.text import spell

OnStep = Callable[[int, int], None]
_SIDES = (1024, 1024)


class PipelineEditor:
    """Edits with one optimized pipeline, at each request's quality level.

    Args:
        pipe: the pipeline.
        passes: the passes that the service was asked for, which decide about the levels.
        model: the model's name.
        applied: all applied passes, with those that place the pipeline; by default `passes`.
    """

    def __init__(
        self,
        pipe: Pipeline,
        passes: tuple[Pass, ...],
        model: str,
        applied: tuple[Pass, ...] | None = None,
    ) -> None:
        self._pipe = pipe
        self._levels = settings_by_level(passes)
        for each in type(pipe).__mro__:  # diffusers logs in the module of the class
            logging.getLogger(each.__module__).addFilter(_holds_no_words)
        self.facts = Facts(
            model,
            str(pipe.device),
            tuple(map(spell, passes if applied is None else applied)),
            {level: describe_level(settings) for level, settings in self._levels.items()},
            current_level(passes),
        )

    def warm_up(self, sizes: tuple[tuple[int, int], ...] | None, batches: set[int]) -> None:
        """Run every size at every batch size, with and without a reference."""
        usual = self._size(None, _SIDES)
        for n in sorted(batches):
            many: dict[str, Any] = {"prompt": ["warm-up"] * n} if n > 1 else {}
            references: list[tuple[int, int]] | None
            for references in (None, []):
                api.warmup(self._pipe, sizes or (usual,), references, **many)

    def edit(
        self, requests: Mapping[int, PipelineRequest], at_once: int, on_step: OnStep
    ) -> dict[int, Result]:
        """Edit requests of one kind.

        Args:
            requests: requests by ticket number.
            at_once: batch size: the most pictures in one call.
            on_step: callback with the steps done and the total; an exception from it ends the run.

        Returns:
            Results by ticket number.
        """
        wanted = [
            (ticket, request, seed)
            for ticket, request in requests.items()
            for seed in request.seeds
        ]
        parts = [wanted[i : i + at_once] for i in range(0, len(wanted), at_once)]
        made: dict[int, list[tuple[RawPicture, list[StepKind]]]] = {
            ticket: [] for ticket in requests
        }
        for number, part in enumerate(parts):
            level = part[0][1].level

            def on_part_step(step: int, steps: int, number: int = number) -> None:
                on_step(number * steps + step, len(parts) * steps)

            with self._using_level(level):
                pictures = self._run([(request, seed) for _, request, seed in part], on_part_step)
            run = api.report(self._pipe).runs[-1]
            for sample, ((ticket, *_), picture) in enumerate(zip(part, pictures, strict=True)):
                made[ticket].append((RawPicture.of(picture), run.kinds_of(sample)))
        return {
            ticket: _result(of, self._warnings(requests[ticket])) for ticket, of in made.items()
        }

    def _warnings(self, request: PipelineRequest) -> tuple[str, ...]:
        """Say which prompts are longer than CLIP can read, without repeating their words."""
        prompts = {"prompt": request.prompt}
        if request.guided and request.negative_prompt is not None:
            prompts["negative_prompt"] = request.negative_prompt
        pipe: Any = self._pipe  # the protocol leaves the tokenizers out
        most = pipe.tokenizer_max_length
        found = []
        for name, text in prompts.items():
            n = len(pipe.tokenizer(text, verbose=False).input_ids)
            if n > most:
                found.append(
                    f"the {name} has {n} tokens, and CLIP reads the first {most} of them; put what "
                    f"matters most at its beginning"
                )
        return tuple(found)

    def _using_level(self, level: Level | None) -> AbstractContextManager[object]:
        """Apply a level's settings in a `with` block; the engine refused unknown levels."""
        settings = () if level is None else self._levels[level]
        return api.using(self._pipe, settings) if settings else nullcontext()

    def _run(
        self, samples: list[tuple[PipelineRequest, int]], on_step: OnStep
    ) -> list[Image.Image]:
        """Call the pipeline once."""
        first = samples[0][0]
        size = self._size(first.picture, first.size)

        @only_watches
        def on_step_end(
            _pipe: object, step: int, _timestep: object, _state: object
        ) -> dict[str, object]:
            on_step(step + 1, first.steps)
            return {}

        call: dict[str, Any] = {
            "prompt": [request.prompt for request, _ in samples],
            "prompt_2": [request.prompt_2 or request.prompt for request, _ in samples],
            **model_of(self._pipe).exact_size(*size),
            "num_inference_steps": first.steps,
            "generator": [torch.Generator().manual_seed(seed) for _, seed in samples],
            "callback_on_step_end": on_step_end,
            "callback_on_step_end_tensor_inputs": [],
        }
        if first.guidance_scale is not None:
            call["guidance_scale"] = first.guidance_scale
        if first.guided:
            negative = [request.negative_prompt or "" for request, _ in samples]
            negative_2 = [
                request.negative_prompt_2 or request.negative_prompt or "" for request, _ in samples
            ]
            call |= {"negative_prompt": negative, "negative_prompt_2": negative_2}
            call["true_cfg_scale"] = first.true_cfg_scale
        if first.picture is not None:
            call |= {"image": list(self._references(samples)), "_auto_resize": False}
        made: list[Image.Image] = self._pipe(**call).images
        return made

    def _references(self, samples: list[tuple[PipelineRequest, int]]) -> Iterator[Image.Image]:
        """Resize the pictures: the pipeline resizes a single picture, but not a list."""
        for request, _ in samples:
            assert request.picture is not None  # noqa: S101 - all requests of a kind have one or none
            picture = request.picture.picture()
            width, height = model_of(self._pipe).reference_size(self._pipe, *picture.size)
            yield self._pipe.image_processor.resize(picture, height, width)

    def _size(
        self, picture: RawPicture | None, wanted_size: tuple[int, int] | None
    ) -> tuple[int, int]:
        """Return the output size: the wanted one, unless the model prescribes the area."""
        shape = wanted_size or ((picture.width, picture.height) if picture else _SIDES)
        if wanted_size is None or hasattr(self._pipe, "reference_size"):
            return model_of(self._pipe).reference_size(self._pipe, *shape)
        return wanted_size


def _holds_no_words(record: logging.LogRecord) -> bool:
    """Whether a record is not the warning that quotes a client's words; `_warnings` counts them."""
    return "was truncated because" not in record.getMessage()


def _result(made: list[tuple[RawPicture, list[StepKind]]], warnings: tuple[str, ...]) -> Result:
    """Build a request's result. A step counts as skipped if all its pictures skipped it."""
    all_kinds = [kinds for _, kinds in made]
    steps: list[StepKind] = []
    for kinds in zip(*all_kinds, strict=True):
        kept: StepKind = "reused" if "reused" in kinds else "hit"
        steps.append("computed" if "computed" in kinds else kept)
    every = [kind for kinds in all_kinds for kind in kinds]
    rate = every.count("hit") / len(every) if every else 0.0
    return Result(tuple(raw for raw, _ in made), tuple(steps), rate, warnings)
