"""From what requests ask to calls of the pipeline, several at once where they are of one kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from PIL import Image

from fluxfire import api
from fluxfire.protocol import Pass
from fluxfire.reporting.statistics import StepKind
from fluxfire.runtime.generation import only_watches
from fluxfire.serve.levels import current, described, offered
from fluxfire.serve.wire import Facts, Level, PipelineRequest, RawPicture, Result
from fluxfire.supported import model_of
from fluxfire.text import spelled

OnStep = Callable[[int, int], None]
_SIDES = (1024, 1024)


class Editor:
    """Edits with one optimized pipeline, at the level that each request wants."""

    def __init__(self, pipe: Any, passes: tuple[Pass, ...], model: str) -> None:
        self._pipe = pipe
        self._levels = offered(passes)
        self.facts = Facts(
            model,
            str(pipe.device),
            tuple(map(spelled, passes)),
            {level: described(settings) for level, settings in self._levels.items()},
            current(passes),
        )

    def warm_up(self, sizes: tuple[tuple[int, int], ...] | None, batches: set[int]) -> None:
        """Run every size at every number of pictures at once, with and without a reference."""
        usual = self._size(None, _SIDES)
        for n in sorted(batches):
            many = {"prompt": ["warm-up"] * n} if n > 1 else {}
            references: list[tuple[int, int]] | None
            for references in (None, []):
                api.warmup(self._pipe, sizes or (usual,), references, **many)

    def edit(
        self, asks: Mapping[int, PipelineRequest], at_once: int, on_step: OnStep
    ) -> dict[int, Result]:
        """Make what is asked, all of it of one kind.

        Args:
            asks: by ticket.
            at_once: how many pictures at once.
            on_step: is told steps made and steps in all; what it raises ends the run.

        Returns:
            Results by ticket.
        """
        wanted = [(ticket, ask, seed) for ticket, ask in asks.items() for seed in ask.seeds]
        parts = [wanted[i : i + at_once] for i in range(0, len(wanted), at_once)]
        made: dict[int, list[tuple[RawPicture, list[StepKind]]]] = {ticket: [] for ticket in asks}
        for number, part in enumerate(parts):
            level = part[0][1].level

            def told(step: int, steps: int, number: int = number) -> None:
                on_step(number * steps + step, len(parts) * steps)

            with self._at(level):
                pictures = self._run([(ask, seed) for _, ask, seed in part], told)
            run = api.report(self._pipe).runs[-1]
            for sample, ((ticket, *_), picture) in enumerate(zip(part, pictures, strict=True)):
                made[ticket].append((RawPicture.of(picture), run.kinds_of(sample)))
        return {ticket: _result(of) for ticket, of in made.items()}

    def _at(self, level: Level | None) -> Any:
        """Use a level's settings; a level that is not there was refused before."""
        settings = () if level is None else self._levels[level]
        return api.using(self._pipe, settings) if settings else nullcontext()

    def _run(
        self, samples: list[tuple[PipelineRequest, int]], on_step: OnStep
    ) -> list[Image.Image]:
        """Call the pipeline once."""
        first = samples[0][0]
        size = self._size(first.picture, first.size)

        @only_watches
        def step_made(_pipe: Any, step: int, _timestep: Any, _state: Any) -> dict[str, Any]:
            on_step(step + 1, first.steps)
            return {}

        call: dict[str, Any] = {
            "prompt": [ask.prompt for ask, _ in samples],
            "prompt_2": [ask.prompt_2 or ask.prompt for ask, _ in samples],
            **model_of(self._pipe).exact_size(*size),
            "num_inference_steps": first.steps,
            "guidance_scale": first.guidance_scale,
            "generator": [torch.Generator().manual_seed(seed) for _, seed in samples],
            "callback_on_step_end": step_made,
            "callback_on_step_end_tensor_inputs": [],
        }
        if first.guided:
            negative = [ask.negative_prompt or "" for ask, _ in samples]
            negative_2 = [ask.negative_prompt_2 or ask.negative_prompt or "" for ask, _ in samples]
            call |= {"negative_prompt": negative, "negative_prompt_2": negative_2}
            call["true_cfg_scale"] = first.true_cfg_scale
        if first.picture is not None:
            call |= {"image": list(self._references(samples)), "_auto_resize": False}
        made: list[Image.Image] = self._pipe(**call).images
        return made

    def _references(self, samples: list[tuple[PipelineRequest, int]]) -> Iterator[Image.Image]:
        """Resize the pictures as the pipeline would: of a list it resizes none."""
        for ask, _ in samples:
            assert ask.picture is not None  # noqa: S101 - all of one kind
            picture = ask.picture.picture()
            width, height = model_of(self._pipe).reference_size(self._pipe, *picture.size)
            yield self._pipe.image_processor.resize(picture, height, width)

    def _size(self, picture: RawPicture | None, wish: tuple[int, int] | None) -> tuple[int, int]:
        """Return the size to make: what is wished for, unless the model has an area of its own."""
        shape = wish or ((picture.width, picture.height) if picture else _SIDES)
        if wish is None or hasattr(self._pipe, "reference_size"):
            return model_of(self._pipe).reference_size(self._pipe, *shape)
        return wish


def _result(made: list[tuple[RawPicture, list[StepKind]]]) -> Result:
    """Put a request's pictures together; a step counts as left out if it was of all."""
    of_all = [kinds for _, kinds in made]
    steps: list[StepKind] = []
    for kinds in zip(*of_all, strict=True):
        kept: StepKind = "reused" if "reused" in kinds else "hit"
        steps.append("computed" if "computed" in kinds else kept)
    every = [kind for kinds in of_all for kind in kinds]
    rate = every.count("hit") / len(every) if every else 0.0
    return Result(tuple(raw for raw, _ in made), tuple(steps), rate)
