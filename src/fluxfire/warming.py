"""Parts of `fluxfire.warmup`: reads sizes, prepares generations of blank pictures, shows a bar."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, SupportsIndex

import torch
from PIL import Image
from typing_extensions import override

from fluxfire.diffusers_types import Pipeline
from fluxfire.errors import PlanError
from fluxfire.model import Call
from fluxfire.reporting.compile_counts import on_compilation
from fluxfire.runtime.conductor import Conductor
from fluxfire.runtime.generation import Generation, Listener
from fluxfire.supported import model_of

Size = tuple[int, int]
Sizes = Iterable[tuple[SupportsIndex, SupportsIndex]]
Counts = SupportsIndex | Iterable[SupportsIndex]
_REFERENCE_ARGUMENTS = {"image", "image_reference"}  # arguments of a pipeline call
_ONE_A_PICTURE = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2", "generator")
"""Arguments of a call that may be lists, with one item for each prompt or picture."""
_MOST_TEXT = 512  # diffusers refuses a longer `max_sequence_length`


def read_output_sizes(pipe: Pipeline, sizes: Sizes) -> list[Size]:
    """Validate output sizes. Iterates over `sizes` once.

    Raises:
        PlanError: an item is no size, the pipeline cannot generate exactly this size, or there is
            no item. The message names the item and the requirement.
    """
    multiple = _size_multiple(pipe)
    read = _read_sizes(
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


def read_reference_sizes(pipe: Pipeline, references: Sizes | None) -> list[Size] | None:
    """Validate sizes of references, and round them down as the pipeline does.

    Iterates over `references` once.

    Raises:
        PlanError: an item is no size, or is too small. The message names the item and the
            requirement.
    """
    if references is None:
        return None
    multiple = _size_multiple(pipe)
    read = _read_sizes(
        references, "a reference", lambda n: n >= multiple, f"whole numbers of {multiple} or more"
    )
    return [(w // multiple * multiple, h // multiple * multiple) for w, h in read]


def read_batches(batch: Counts | None, call: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Validate numbers of pictures in a call. Iterates over `batch` once.

    Returns:
        The arguments of a pipeline call for each number; one without arguments for None.

    Raises:
        PlanError: an item is no whole number of 1 or more, there is no item, or `call` says how
            many pictures there are, too.
    """
    if batch is None:
        return [{}]
    counts = _read_counts(batch, "batch", "numbers of pictures in a call, such as (1, 4)", None)
    several = [n for n in _ONE_A_PICTURE if isinstance(call.get(n), list | tuple)]
    if given := [*sorted(call.keys() & {"num_images_per_prompt", "latents"}), *several]:
        raise PlanError(
            f"warmup takes batch=(1, 4) instead of {' and '.join(given)}; leave one of them out"
        )
    return [{"num_images_per_prompt": count} for count in counts]


def read_text_lengths(text: Counts | None, call: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Validate numbers of text tokens. Iterates over `text` once.

    Returns:
        The arguments of a pipeline call for each number; one without arguments for None.

    Raises:
        PlanError: an item is no whole number from 1 to 512, there is no item, or `call` has an
            argument that determines the number, too.
    """
    if text is None:
        return [{}]
    lengths = _read_counts(text, "text", "numbers of text tokens, such as (128, 512)", _MOST_TEXT)
    fixing = {"max_sequence_length", "prompt_embeds", "negative_prompt_embeds"}
    if given := sorted(call.keys() & fixing):
        raise PlanError(
            f"warmup takes text=(128, 512) instead of {' and '.join(given)}; leave one of them out"
        )
    return [{"max_sequence_length": length} for length in lengths]


def _read_counts(given: Any, name: str, what: str, most: int | None) -> list[int]:
    read = []
    items: Iterable[Any] = [given] if isinstance(given, Mapping) else _items(given)
    for item in items:
        try:
            count = None if isinstance(item, bool) else operator.index(item)
        except TypeError:
            count = None
        if count is None or count < 1 or (most is not None and count > most):
            allowed = "1 or more" if most is None else f"from 1 to {most}"
            raise PlanError(
                f"warmup cannot use {item!r} in {name}={given!r}: "
                f"give {what}, each a whole number, {allowed}"
            )
        read.append(count)
    if not read:
        raise PlanError(f"warmup found nothing in {name}={given!r}: give {what}, or leave it out")
    return list(dict.fromkeys(read))


def combinations(
    batches: list[dict[str, Any]], texts: list[dict[str, Any]], sizes: list[Size]
) -> Iterator[tuple[Size, dict[str, Any]]]:
    """Yield every size with every number of pictures and of text tokens.

    The order needs few compilations. torch compiles the first shape for itself, and makes dynamic
    what differs in the next one. So the second shape differs from the first in size and text at
    once. torch treats one picture apart from several, so the number of pictures changes last.
    """
    for batch in batches:
        first, *others = [(size, {**batch, **text}) for text in texts for size in sizes]
        yield first
        yield from reversed(others)


def refuse_size_arguments(
    pipe: Pipeline, call: dict[str, Any], references: list[Size] | None
) -> None:
    """Refuse arguments of a pipeline call that contradict the sizes.

    Raises:
        PlanError: there are such arguments. The message names them.
    """
    contradicting = sorted(call.keys() & {"width", "height", "max_area"})
    if contradicting:
        names = ", ".join(contradicting)
        raise PlanError(f"warmup takes sizes=[(width, height)] instead of {names}")
    pictures = sorted(call.keys() & {"image", "mask_image"})
    if pictures and _inpaints(pipe):
        raise PlanError(
            f"warmup makes a blank picture and mask of each size, because an inpainting pipeline "
            f"takes the output's size from the picture; leave out {' and '.join(pictures)}"
        )
    pictures = sorted(call.keys() & _REFERENCE_ARGUMENTS)
    if references is not None and pictures:
        raise PlanError(
            f"warmup would not use references={references!r} beside {' and '.join(pictures)}; "
            f"leave one of them out"
        )


def _inpaints(pipe: Pipeline) -> bool:
    return hasattr(pipe, "mask_processor")


def _size_multiple(pipe: Pipeline) -> int:
    return model_of(pipe).size_multiple(pipe)


def _read_sizes(given: Any, role: str, fits: Callable[[int], bool], must: str) -> list[Size]:
    """Validate sizes.

    Args:
        given: the sizes as the user wrote them.
        role: what has such a size, for error messages.
        fits: whether a side is valid.
        must: what both sides must be, for error messages.

    Raises:
        PlanError: an item is no size, or a side does not fit.
    """
    if isinstance(given, Iterator):
        given = list(given)
        if not given:
            raise PlanError(
                f"warmup cannot use an iterator with no size of {role} left in it; "
                f"an iterator can be read only once, so give a list"
            )
    read = []
    for item in _items(given):
        size = _parse_size(item)
        if size is None or not all(map(fits, size)):
            hint = "" if size else f", in a list such as [(1024, 1024)], not {given!r}"
            raise PlanError(
                f"warmup cannot use {role} of size {item!r}: "
                f"it must be (width, height), both {must}{hint}"
            )
        read.append(size)
    return read


def _items(given: Any) -> Iterator[Any]:
    """Iterate over an iterable; treat anything else, and a string, as a single item."""
    try:
        return iter([given] if isinstance(given, str | bytes) else given)
    except TypeError:
        return iter([given])


def _parse_size(size: Any) -> Size | None:
    """Return width and height; None if the item is not two whole numbers in order."""
    if isinstance(size, set | frozenset | Mapping | bytes):
        return None
    try:
        width, height = size
        return operator.index(width), operator.index(height)
    except (TypeError, ValueError):
        return None


def blank_calls(
    pipe: Pipeline, size: Size, references: list[Size] | None, call: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yield the arguments of one generation with a blank picture for each reference.

    Args:
        pipe: a pipeline for editing or inpainting.
        size: output size, (width, height).
        references: sizes of reference pictures before the pipeline resizes them; None means one
            reference with the output's aspect ratio, and an empty list means text-to-image.
        call: the user's arguments, which override these.
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
    inpaints = _inpaints(pipe)
    if inpaints:
        arguments |= {"image": _blank(size), "mask_image": _blank(size)}
    if call.keys() & _REFERENCE_ARGUMENTS:
        yield arguments | call
        return
    resized = call.get("_auto_resize", True)
    for reference in [size] if references is None else references:
        picture = _blank(model_of(pipe).reference_size(pipe, *reference) if resized else reference)
        name = "image_reference" if inpaints else "image"
        # The picture has the resized size already; resizing it again could change the size.
        yield arguments | {name: picture} | call | {"_auto_resize": False}
    if references is not None and not references:
        yield arguments | call | {"_auto_resize": False}


def _blank(size: Size) -> Image.Image:
    return Image.new("RGB", size, "gray")


class Progress(Listener):
    """One progress bar for all sizes. It shows the current phase: load, compile, or a step.

    The bar follows the pipeline's own `set_progress_bar_config`. The pipeline's bars for single
    generations are off in the meantime.
    """

    def __init__(self, pipe: Pipeline, total: int) -> None:
        self._pipe = pipe
        self._bar = pipe.progress_bar(total=total)
        self._size = ""

    @contextmanager
    def show(self, conductor: Conductor) -> Iterator[None]:
        """Show the bar inside the block.

        The bar is the first listener, so that it also covers the work of the passes' listeners.
        """
        before: dict[str, Any] = self._pipe._progress_bar_config  # noqa: SLF001 - no public getter
        self._pipe.set_progress_bar_config(**{**before, "disable": True})
        conductor.listeners.insert(0, self)
        try:
            with self._bar:
                yield
        finally:
            conductor.listeners.remove(self)
            self._pipe.set_progress_bar_config(**before)

    def begin(self, size: Size) -> None:
        """Show a new size."""
        self._size = f"{size[0]}x{size[1]}"

    @override
    @contextmanager
    def on_generation(self, generation: Generation) -> Iterator[None]:
        """Show compilations, and advance the bar after the generation."""
        self._show_phase("load")
        with on_compilation(
            lambda _: self._show_phase("trace and compile"),
            lambda _: self._show_phase("first step"),
        ):
            yield
        self._bar.update()

    @override
    @contextmanager
    def on_step(self, call: Call) -> Iterator[None]:
        """Show the step."""
        self._show_phase(f"step {call.step + 1} of {call.steps}")
        yield

    def _show_phase(self, phase: str) -> None:
        self._bar.set_description(f"warm-up {self._size}: {phase}")
