"""The functions of the library: load, plan, optimize, restore, optimized, using, report, warmup."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

from fluxfire import loading, presets
from fluxfire.applying import (
    applied_passes,
    apply_passes,
    find_conductor,
    finish_warmup,
    replace_passes,
    undo,
)
from fluxfire.diffusers_types import DiffusersPipeline, Pipeline
from fluxfire.errors import PlanError
from fluxfire.passes.contrib.placement import Placement, default_device
from fluxfire.planning.check import make_plan
from fluxfire.planning.memory import fit
from fluxfire.planning.plan import Plan
from fluxfire.planning.resolve import Passes
from fluxfire.planning.retune import pair_live_settings
from fluxfire.planning.rules import why_not_a_pass
from fluxfire.protocol import Pass
from fluxfire.reporting.applications import Applications
from fluxfire.reporting.report import Report
from fluxfire.runtime.conductor import conductor_of_transformer, warmup_run
from fluxfire.warming import (
    Counts,
    Progress,
    Sizes,
    blank_calls,
    combinations,
    read_batches,
    read_output_sizes,
    read_reference_sizes,
    read_text_lengths,
    refuse_size_arguments,
)

if TYPE_CHECKING:
    import torch

__all__ = ["load", "optimize", "optimized", "plan", "report", "restore", "using", "warmup"]

P = TypeVar("P")


def load(
    model: str,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    memory: str | int | None = None,
) -> DiffusersPipeline:
    """Load a Kontext pipeline.

    Args:
        model: a folder that `save_pretrained` wrote; or a hub id such as
            `black-forest-labs/FLUX.1-Kontext-dev`; or `spark`, the small trained Kontext that ships
            with fluxfire; or `random-tiny` or `random-full`, a Kontext with random weights.
        device: by default `"cuda"` if there is a CUDA device, else `"cpu"`.
        dtype: by default bfloat16 on CUDA, else float32.
        memory: load into host memory, and return what `optimize(pipe, memory=memory)` makes of it.
            The weights there are the checkpoint's own files, mapped into memory. So neither the
            host nor the GPU ever holds the whole model in bfloat16. By default the pipeline is
            plain, and as a whole on the device.

    Raises:
        LoadError: the pipeline cannot be loaded. The message says why, and what to do.
        PlanError: `memory` is no amount of memory, or `optimize` refuses the pipeline.
    """
    if memory is None:
        return loading.load(model, device=device, dtype=dtype)
    where = default_device(device)
    made = loading.load(model, device="cpu", dtype=dtype or loading.default_dtype(where.type))
    return optimize(made, [Placement(device=device), *presets.faithful], memory=memory)


def plan(pipe: object, passes: Passes = "faithful", *, memory: str | int | None = None) -> Plan:
    """Return what `optimize` would do. Changes nothing.

    Args:
        pipe: a `FluxKontextPipeline` or `FluxKontextInpaintPipeline`.
        passes: as for `optimize`.
        memory: as for `optimize`.

    Returns:
        The plan. It prints as a table. `plan.ok` is True if `optimize` would go ahead.

    Raises:
        PlanError: there is no such preset, a file cannot be read, `passes` is no list, or `memory`
            is no amount of memory.
    """
    if memory is not None:
        passes = fit(pipe, passes, memory)
    return make_plan(pipe, passes, applied_passes(pipe))


def optimize(
    pipe: P,
    passes: Passes = "faithful",
    *,
    memory: str | int | None = None,
    replace: bool = False,
) -> P:
    """Apply passes to a pipeline, in place.

    All passes check the pipeline before fluxfire applies the first. A second call adds its passes
    to the passes of the first call, unless it replaces them. A warning of a check becomes a
    `FluxfireWarning`. The logger `fluxfire` gets a line for each applied pass, at level INFO.

    An interrupt (Ctrl-C) rolls back what this call did; if it hits the rollback itself, one
    `restore` finishes it.

    Args:
        pipe: a `FluxKontextPipeline` or `FluxKontextInpaintPipeline`.
        passes: the name of a preset (`"faithful"`, `"balanced"`, `"fast"`, `"article"`); or a list
            of passes in order, where a string is the name of a pass or of its class, with default
            settings; or a file ending in `.json` that `fluxfire tune` or `calibrate` wrote.
        memory: for a pipeline in host memory, as `from_pretrained` returns it: put it on the GPU so
            that it needs no more memory than this. Bytes, text such as `"16GiB"`, or `"auto"` for
            what the GPU has. fluxfire adds `Placement`; if the weights need it,
            `ModulationTable(host=True)`; and if that is not enough, `Int8`, which is lossy.
        replace: first undo the passes that the pipeline carries. If the new list cannot be applied,
            the old passes are applied again.

    Returns:
        The same pipeline.

    Raises:
        PlanError: the list cannot be applied. Nothing was changed. The message lists everything
            that is wrong, and a list that would work.
        PassError: a pass failed. Everything that this call did was rolled back.
        BusyError: the pipeline is generating.
    """
    if memory is not None:
        passes = fit(pipe, passes, memory)
    (replace_passes if replace else apply_passes)(pipe, passes)
    return pipe


def restore(pipe: P, *, shared: bool = False) -> P:
    """Undo everything that fluxfire did to a pipeline, bit for bit.

    Does nothing to a plain pipeline, so a second call is safe. If an interrupt (Ctrl-C) hits
    `restore`, one more `restore` finishes it.

    Args:
        pipe: the pipeline.
        shared: for a plain pipeline whose transformer was optimized through another pipeline: undo
            that. For example, `pipe = FluxKontextInpaintPipeline.from_pipe(pipe)` leaves nobody
            with the pipeline that was optimized.

    Returns:
        The same pipeline.

    Raises:
        PlanError: this is no Kontext pipeline, or a pass has freed data that `restore` needs.
        BusyError: the pipeline is generating.
        RestoreError: some edits could not be undone; all others were.
    """
    conductor = find_conductor(pipe)
    if conductor is None and shared:
        conductor = conductor_of_transformer(cast("Pipeline", pipe).transformer)
    if conductor is not None:
        undo(conductor)
    return pipe


@contextmanager
def optimized(pipe: P, passes: Passes = "faithful") -> Iterator[P]:
    """Optimize a pipeline inside a `with` block, and restore it afterwards.

    Args:
        pipe: a plain pipeline, as for `optimize`.
        passes: as for `optimize`.

    Raises:
        PlanError: the pipeline carries passes already, or the list cannot be applied. Nothing was
            changed.
        PassError: a pass failed. Everything was rolled back.
        BusyError: the pipeline is generating.
        RestoreError: at the end of the block, some edits could not be undone; all others were.
    """
    if applied_passes(pipe):
        raise PlanError(
            "optimized() needs a plain pipeline, and this one carries passes already. "
            "Nothing was changed; restore(pipe) first, or use optimize()"
        )
    optimize(pipe, passes)
    try:
        yield pipe
    finally:
        restore(pipe)


@contextmanager
def using(pipe: P, settings: Passes | Pass) -> Iterator[P]:
    """Change settings of applied passes inside a `with` block.

    Nothing is applied, undone or compiled. Only settings that a pass reads anew for each generation
    can change, such as a cache's threshold or schedule. If blocks of two threads overlap, each
    thread uses its own settings.

    Args:
        pipe: an optimized pipeline.
        settings: one pass with the new settings, or a list of them, or a preset's name. Each of the
            passes must be applied already. Other applied passes keep their settings.

    Raises:
        PlanError: a pass is not applied, or a setting cannot change at run time. Nothing was
            changed.
        BusyError: the pipeline is generating.
    """
    conductor = find_conductor(pipe)
    if conductor is None:
        raise PlanError("using() needs an optimized pipeline; call optimize(pipe) first")
    passes = [settings] if why_not_a_pass(settings) is None else settings
    pairs = pair_live_settings(conductor.live, Applications.of(conductor).passes, passes)  # type: ignore[arg-type]
    with ExitStack() as entered:
        with conductor.while_idle("change settings"):
            for live, pass_ in pairs:
                entered.enter_context(live.using(pass_))
        # The exit may happen during a generation: a generation reads its settings at its begin.
        yield pipe


def report(pipe: object) -> Report:
    """Return what passes did to a pipeline, and the cost of its generations so far.

    Args:
        pipe: a Kontext pipeline. The report of a plain pipeline is empty.

    Returns:
        The report. It prints as tables.

    Raises:
        PlanError: this is no Kontext pipeline.
    """
    conductor = find_conductor(pipe)
    if conductor is None:
        return Report()
    record = Applications.of(conductor)
    passes = tuple(
        dataclasses.replace(one, facts=dict(record.facts[one.name]()))
        if one.name in record.facts
        else one
        for one in record.reports
    )
    return Report(passes, record.warmup_seconds, tuple(record.statistics.runs))


def warmup(
    pipe: P,
    sizes: Sizes,
    references: Sizes | None = None,
    *,
    batch: Counts | None = None,
    text: Counts | None = None,
    **call: Any,
) -> P:
    """Run the pipeline once for each output size, so that later calls need not compile.

    Each run has two denoising steps, unless `call` says otherwise. The runs do not change the
    global random state. A progress bar shows sizes and phases, unless the pipeline's bars are
    disabled. All arguments are checked before the first run.

    Args:
        pipe: an optimized pipeline.
        sizes: output sizes as (width, height) in pixels, multiples of 16. The outputs have exactly
            these sizes; Kontext does not rescale them to one megapixel. A list or any other
            iterable of pairs of whole numbers, such as a generator or a NumPy array. It is read
            once.
        references: sizes of reference pictures; as `sizes`, but any whole numbers of 16 or more.
            Each output size runs with each reference size. None means one blank reference with the
            output's aspect ratio, in the size to which the pipeline resizes it. An empty list means
            text-to-image.
        batch: numbers of pictures in a call (`num_images_per_prompt`), such as `(1, 4)`, or one
            number: whole, 1 or more. Each size runs with each number. None means one picture.
        text: values of `max_sequence_length`, such as `(128, 512)`, or one value: whole numbers of
            text tokens from 1 to 512. Each size runs with each value. None means the pipeline's own
            default.
        **call: more arguments of the pipeline call. Arguments that change shapes, such as
            `prompt_embeds`, must have the values of later calls.

    Returns:
        The same pipeline.

    Raises:
        PlanError: the pipeline is not optimized, there is no size, the pipeline cannot run a size,
            a number in `batch` or `text` is not allowed, or an argument in `call` contradicts
            sizes, references, `batch` or `text`. Nothing was run.
        PassError: a pass's `after_warmup` failed. Its edits were rolled back.
        BusyError: the pipeline is generating.
    """
    conductor = find_conductor(pipe)
    if conductor is None:
        raise PlanError("warmup needs an optimized pipeline; call optimize(pipe) first")
    known = cast("Pipeline", pipe)
    outputs = read_output_sizes(known, sizes)
    pictures = read_reference_sizes(known, references)
    refuse_size_arguments(known, call, pictures)
    shapes = list(combinations(read_batches(batch, call), read_text_lengths(text, call), outputs))
    record = Applications.of(conductor)
    began = time.perf_counter()
    calls = [
        (size, arguments)
        for size, shape in shapes
        for arguments in blank_calls(known, size, pictures, shape | call)
    ]
    progress = Progress(known, len(calls))
    with progress.show(conductor), warmup_run(pipe):
        for size, arguments in calls:
            progress.begin(size)
            known(**arguments)
    finish_warmup(known)
    record.warmup_seconds = (record.warmup_seconds or 0.0) + time.perf_counter() - began
    return pipe
