"""Blank generations of given sizes, for `fluxfire.warmup`, and a progress bar over them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, SupportsIndex

import torch
from PIL import Image
from typing_extensions import override

from fluxfire.errors import PlanError
from fluxfire.model import Call
from fluxfire.reporting.compile_counts import hearing
from fluxfire.runtime.conductor import Conductor
from fluxfire.runtime.generation import Generation, Listener
from fluxfire.supported import model_of

Size = tuple[int, int]
Sizes = Iterable[tuple[SupportsIndex, SupportsIndex]]
_PICTURES = {"image", "image_reference"}  # arguments of a call that stand for references


def output_sizes(pipe: Any, sizes: Sizes) -> list[Size]:
    """Read output sizes, once. Refuse what is no size, and what the pipeline cannot run exactly.

    Raises:
        PlanError: naming the size and what it must be, or there is no size.
    """
    multiple = _multiple(pipe)
    read = _read(
        sizes,
        "an output",
        lambda n: n > 0 and n % multiple == 0,
        f"positive multiples of {multiple}",
    )
    if not read:
        raise PlanError(
            f"warmup found no size of an output in {sizes!r}; "
            f"give one or more, such as [(1024, 1024)]"
        )
    return read


def reference_sizes(pipe: Any, references: Sizes | None) -> list[Size] | None:
    """Read sizes of references, once, and round them down as the pipeline does.

    Raises:
        PlanError: naming what is no size, or too small, and what it must be.
    """
    if references is None:
        return None
    multiple = _multiple(pipe)
    read = _read(
        references, "a reference", lambda n: n >= multiple, f"whole numbers of {multiple} or more"
    )
    return [(w // multiple * multiple, h // multiple * multiple) for w, h in read]


def check_call(call: dict[str, Any], references: list[Size] | None) -> None:
    """Refuse arguments that would overrule the sizes.

    Raises:
        PlanError: naming them.
    """
    overruling = sorted(call.keys() & {"width", "height", "max_area"})
    if overruling:
        raise PlanError(f"warmup takes sizes=[(width, height)] instead of {', '.join(overruling)}")
    pictures = sorted(call.keys() & _PICTURES)
    if references is not None and pictures:
        raise PlanError(
            f"warmup would not use references={references!r} beside {' and '.join(pictures)}; "
            f"leave one out"
        )


def _multiple(pipe: Any) -> int:
    """Return what the sides of all pictures in a pipeline are multiples of, in pixels."""
    return model_of(pipe).size_multiple(pipe)


def _read(given: Any, role: str, fits: Callable[[int], bool], must: str) -> list[Size]:
    """Read the sizes that something in this role may have, once; each side must fit."""
    if isinstance(given, Iterator):
        given = list(given)
        if not given:
            raise PlanError(
                f"warmup cannot use an iterator with no size of {role} left in it; "
                f"an iterator can be read only once, so give a list"
            )
    read = []
    for one in _items(given):
        size = _pair(one)
        if size is None or not all(map(fits, size)):
            hint = "" if size else f", in a list such as [(1024, 1024)], not {given!r}"
            raise PlanError(
                f"warmup cannot use {role} of size {one!r}: "
                f"it must be (width, height), both {must}{hint}"
            )
        read.append(size)
    return read


def _items(given: Any) -> Iterator[Any]:
    """Go through what may be a list; through nothing but itself if it is none."""
    try:
        return iter([given] if isinstance(given, str | bytes) else given)
    except TypeError:
        return iter([given])


def _pair(size: Any) -> Size | None:
    """Return a size as two numbers; None if it is not two whole numbers in order."""
    if isinstance(size, set | frozenset | Mapping | bytes):
        return None
    try:
        width, height = size
        return operator.index(width), operator.index(height)
    except (TypeError, ValueError):
        return None


def blank_calls(
    pipe: Any, size: Size, references: list[Size] | None, call: dict[str, Any]
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
        **model_of(pipe).exact_size(*size),
    }
    if "prompt_embeds" in call:
        del arguments["prompt"]
    inpaints = hasattr(pipe, "mask_processor")
    if inpaints:  # the output has the picture's size
        arguments |= {"image": _blank(size), "mask_image": _blank(size)}
    if call.keys() & _PICTURES:
        yield arguments | call
        return
    resized = call.get("_auto_resize", True)
    for reference in [size] if references is None else references:
        picture = _blank(model_of(pipe).reference_size(pipe, *reference) if resized else reference)
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
    def on_generation(self, generation: Generation) -> Iterator[None]:
        """Tell compiling from running."""
        self._say("load")
        with hearing(lambda _: self._say("trace and compile"), lambda _: self._say("first step")):
            yield
        self._bar.update()

    @override
    @contextmanager
    def on_step(self, call: Call) -> Iterator[None]:
        """Say which step runs."""
        self._say(f"step {call.step + 1} of {call.steps}")
        yield

    def _say(self, phase: str) -> None:
        self._bar.set_description(f"warm-up {self._size}: {phase}")
