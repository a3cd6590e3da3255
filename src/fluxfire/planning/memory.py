"""Adds to a list of passes what it needs to fit into a GPU's memory."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from fluxfire import modules
from fluxfire.diffusers_types import Pipeline
from fluxfire.errors import PlanError
from fluxfire.passes import Int8, ModulationTable, Placement
from fluxfire.passes.contrib.placement import ROOM, default_device
from fluxfire.planning.resolve import Passes, resolve
from fluxfire.planning.rules import sort_by_stage
from fluxfire.protocol import Pass
from fluxfire.supported import model_of, refusal
from fluxfire.text import human_bytes, read_bytes, spell
from fluxfire.weights import DroppedWeight

AUTO = "auto"


class Sizes(NamedTuple):
    """Bytes of a pipeline's weights, by what can be done about them.

    Attributes:
        blocks: the linear layers of the transformer's blocks; `Int8` halves those in bfloat16.
        modulations: `ModulationTable(host=True)` keeps them in host memory.
        text: the linear layers of the largest text encoder, which `Placement` can stream.
        rest: everything else.
    """

    blocks: int
    modulations: int
    text: int
    rest: int


def fit(pipe: object, passes: Passes, memory: str | int) -> Passes:
    """Return a list with the passes that a pipeline needs to run in an amount of GPU memory.

    It adds the first of these that does, by the sizes of the weights:

    1. `Placement(memory=…)`, which changes no bit as long as the VAE needs no tiles;
    2. also `ModulationTable(host=True)`, which rounds differently;
    3. also `Int8()`, which is lossy.

    It adds no pass that the list has, and none to a slot that the list fills.

    Args:
        pipe: a Kontext pipeline; for any other object, the plan says what is wrong.
        passes: as for `fluxfire.optimize`.
        memory: bytes, text such as `"16GiB"`, or `"auto"` for what the GPU has.

    Raises:
        PlanError: `memory` is no amount of memory, or `passes` is no list.
    """
    given, errors = resolve(passes)
    limit = _read(memory)
    if errors or refusal(pipe) is not None:
        return passes
    own = next((p for p in given if isinstance(p, Placement)), Placement())
    if limit is None and own.memory is not None:
        limit = read_bytes(own.memory)
    placement = own if limit is None else replace(own, memory=limit)
    known: Pipeline = pipe  # type: ignore[assignment]
    device = default_device(own.device)
    capacity = min(modules.usable_bytes(device), float("inf") if limit is None else limit)
    needed = _passes_needed(measure(known), capacity)
    taken = {p.name for p in given} | {p.slot for p in given if p.slot is not None}
    added = [p for p in needed if p.name not in taken and p.slot not in taken]
    kept = [placement if isinstance(p, Placement) else p for p in given]
    first = [] if placement in kept else [placement]
    return sort_by_stage([*first, *added, *kept])


def advise(pipe: Pipeline, capacity: float) -> str:
    """Say in a line how a pipeline fits into an amount of GPU memory, by the sizes of its weights.

    Args:
        pipe: a Kontext pipeline; its weights may be on the meta device.
        capacity: bytes.
    """
    sizes = measure(pipe)
    if sum(sizes) + ROOM <= capacity:
        return "fits as a whole"
    needed = _passes_needed(sizes, capacity)
    least = sizes.rest + sizes.blocks // 2 + ROOM
    if any(isinstance(p, Int8) for p in needed) and least > capacity:
        wanted = human_bytes(least).lstrip("+")
        return f"does not fit: fluxfire needs {wanted} for an edit of one megapixel"
    added = ", ".join(spell(p) for p in (Placement(), *needed))
    lossy = "lossy" if any(p.exactness == "lossy" for p in needed) else "nothing lossy"
    return f'fits with optimize(pipe, memory="auto"), which adds {added}: {lossy}'


def measure(pipe: Pipeline) -> Sizes:
    """Measure a pipeline's weights."""
    model = model_of(pipe)
    blocks = model.blocks(pipe.transformer)
    linears = {getattr(*at) for block in blocks for at in model.linears(block)}
    norms = {norm for block in blocks for norm in model.modulated_norms(block)}
    encoder = max(model.text_encoders(pipe), key=_bytes, default=torch.nn.Module())
    text = [part for part in encoder.modules() if isinstance(part, torch.nn.Linear)]
    in_blocks, of_norms, of_text = (sum(map(_bytes, parts)) for parts in (linears, norms, text))
    whole = sum(_bytes(component) for _, component in modules.components(pipe))
    return Sizes(in_blocks, of_norms, of_text, whole - in_blocks - of_norms - of_text)


def _bytes(module: torch.nn.Module) -> int:
    tensors = {*module.parameters(), *module.buffers()}
    # The placeholder of a weight that an int8 checkpoint has elsewhere takes no memory.
    return sum(tensor.nbytes for tensor in tensors if not isinstance(tensor, DroppedWeight))


def _passes_needed(sizes: Sizes, capacity: float) -> list[Pass]:
    """Return what to add to `Placement`."""
    needed = sizes.rest + ROOM + sizes.blocks + sizes.modulations
    if needed <= capacity:
        return []
    if needed - sizes.modulations <= capacity:
        return [ModulationTable(host=True)]
    return [Int8(), ModulationTable(host=True)]


def _read(memory: str | int) -> int | None:
    if memory == AUTO:
        return None
    try:
        return read_bytes(memory)
    except ValueError as error:
        raise PlanError(f"memory: {error}, or 'auto' for what the GPU has") from None
