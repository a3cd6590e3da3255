"""Blank generations of given sizes, for `fluxfire.warmup`, and a progress bar over them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from typing_extensions import override

from fluxfire import kontext
from fluxfire.conductor import Conductor
from fluxfire.errors import PlanError
from fluxfire.generation import Generation, Listener
from fluxfire.reporting.compile_counts import hearing

Size = tuple[int, int]


def check_sizes(pipe: Any, sizes: Sequence[Size], references: Sequence[Size]) -> None:
    """Refuse output sizes that the pipeline cannot run exactly, and what is no size.

    Raises:
        PlanError: naming the size and what it must be.
    """
    multiple = pipe.vae_scale_factor * 2
    if not sizes or not all(isinstance(size, Sequence) for size in sizes):
        raise PlanError(f"warmup needs a list of sizes, such as [(1024, 1024)], not {sizes!r}")
    for size in sizes:
        if not _is_size(size, multiple):
            raise PlanError(
                f"warmup cannot run size {size!r}: it must be (width, height), "
                f"both positive multiples of {multiple}"
            )
    for size in references:
        if not _is_size(size, 1):
            raise PlanError(
                f"warmup cannot use a reference of size {size!r}: it must be (width, height), "
                f"both positive"
            )


def check_call(call: dict[str, Any]) -> None:
    """Refuse arguments that would overrule the sizes.

    Raises:
        PlanError: naming them.
    """
    overruling = sorted(call.keys() & {"width", "height", "max_area"})
    if overruling:
        raise PlanError(f"warmup takes sizes=[(width, height)] instead of {', '.join(overruling)}")


def _is_size(size: object, multiple: int) -> bool:
    return (
        isinstance(size, Sequence)
        and len(size) == 2  # noqa: PLR2004 - width and height
        and all(isinstance(n, int) and n > 0 and n % multiple == 0 for n in size)
    )


def blank_calls(
    pipe: Any, size: Size, references: Sequence[Size] | None, call: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yield the arguments of one generation for each reference.

    Args:
        pipe: the pipeline, editing or inpainting.
        size: output size, (width, height).
        references: sizes of reference pictures before the pipeline resizes them; None for
            one of the output's shape, empty for none.
        call: the user's arguments, which win.
    """
    arguments: dict[str, Any] = {
        "prompt": "warm-up",
        "num_inference_steps": 2,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "np",
        **kontext.exact_size(*size),
    }
    if "prompt_embeds" in call:
        del arguments["prompt"]
    inpaints = hasattr(pipe, "mask_processor")
    if inpaints:  # the output has the picture's size
        arguments |= {"image": _blank(size), "mask_image": _blank(size)}
    if "image" in call or "image_reference" in call:
        yield arguments | call
        return
    resized = call.get("_auto_resize", True)
    for reference in [size] if references is None else references:
        picture = _blank(kontext.reference_size(pipe, *reference) if resized else reference)
        role = "image_reference" if inpaints else "image"
        # The blank already has the size that the pipeline would give it.
        yield arguments | {role: picture} | call | {"_auto_resize": False}
    if references is not None and not references:
        yield arguments | call | {"_auto_resize": False}


def _blank(size: Size) -> Image.Image:
    return Image.new("RGB", size, "gray")


class Progress(Listener):
    """One bar over all sizes, which says what is being done: load, compile, or run a step.

    It follows the pipeline's own `set_progress_bar_config`; the bars of the single
    generations are off meanwhile.
    """

    def __init__(self, pipe: Any, total: int) -> None:
        self._pipe = pipe
        self._bar = pipe.progress_bar(total=total)
        self._size = ""

    @contextmanager
    def shown(self, conductor: Conductor) -> Iterator[None]:
        """Show the bar, and hear of the generations before all passes do."""
        before: dict[str, Any] = self._pipe._progress_bar_config  # noqa: SLF001 - nothing tells it
        self._pipe.set_progress_bar_config(**{**before, "disable": True})
        conductor.listeners.insert(0, self)
        try:
            with self._bar:
                yield
        finally:
            conductor.listeners.remove(self)
            self._pipe.set_progress_bar_config(**before)

    def begin(self, size: Size) -> None:
        """Say which size comes next."""
        self._size = f"{size[0]}x{size[1]}"

    @override
    @contextmanager
    def during(self, generation: Generation) -> Iterator[None]:
        """Tell compiling from running."""
        self._say("load")
        with hearing(lambda _: self._say("trace and compile"), lambda _: self._say("first step")):
            yield
        self._bar.update()

    @override
    @contextmanager
    def around(self, call: kontext.Call) -> Iterator[None]:
        """Say which step runs."""
        self._say(f"step {call.step + 1} of {call.steps}")
        yield

    def _say(self, phase: str) -> None:
        self._bar.set_description(f"warm-up {self._size}: {phase}")
