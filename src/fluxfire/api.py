"""The verbs of the library: plan, optimize and restore, using, report, warmup."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from fluxfire.applying import (
    applied_passes,
    apply_passes,
    finish_warmup,
    known_conductor,
    undo,
)
from fluxfire.errors import PlanError
from fluxfire.planning.check import make_plan
from fluxfire.planning.plan import Plan
from fluxfire.planning.resolve import Passes
from fluxfire.planning.retune import retuned
from fluxfire.planning.rules import malformed
from fluxfire.protocol import Pass
from fluxfire.reporting.applications import Applications
from fluxfire.reporting.report import Report
from fluxfire.runtime.conductor import warmup_run
from fluxfire.warming import (
    Progress,
    Sizes,
    blank_calls,
    check_call,
    output_sizes,
    reference_sizes,
)

__all__ = ["optimize", "optimized", "plan", "report", "restore", "using", "warmup"]

P = TypeVar("P")


def plan(pipe: Any, passes: Passes = None) -> Plan:
    """Say what `optimize` would do, and change nothing.

    Args:
        pipe: a `FluxKontextPipeline` or `FluxKontextInpaintPipeline`.
        passes: as for `optimize`.

    Returns:
        The plan. It prints as a table; `plan.ok` says whether `optimize` would go ahead.

    Raises:
        PlanError: there is no such preset, a file cannot be read, or `passes` is no list.
    """
    return make_plan(pipe, passes, applied_passes(pipe))


def optimize(pipe: P, passes: Passes = None) -> P:
    """Apply passes to a pipeline, in place.

    Every pass is checked before any is applied. A second call adds to the first.

    Args:
        pipe: a `FluxKontextPipeline` or `FluxKontextInpaintPipeline`.
        passes: passes in order, or the name of a preset, or a file ending in `.json` that
            `fluxfire tune` wrote; a string within the list is the name of a pass, used with
            its defaults. None means the preset `faithful`.

    Returns:
        The same pipeline.

    Raises:
        PlanError: the list cannot be applied; nothing was changed. Says everything that
            is wrong, and a list that would work.
        PassError: a pass failed; everything this call did was rolled back.
        BusyError: the pipeline is generating.
    """
    apply_passes(pipe, passes)
    return pipe


def restore(pipe: P) -> P:
    """Undo everything that fluxfire did to a pipeline, bit for bit.

    Does nothing to a plain pipeline, so calling it twice is safe.

    Returns:
        The same pipeline.

    Raises:
        PlanError: this is no Kontext pipeline, or a pass let go of what it would need.
        BusyError: the pipeline is generating.
        RestoreError: some edits could not be undone; all others were.
    """
    conductor = known_conductor(pipe)
    if conductor is not None:
        undo(conductor)
    return pipe


@contextmanager
def optimized(pipe: P, passes: Passes = None) -> Iterator[P]:
    """Optimize for the length of a `with` block, and restore afterwards.

    Args:
        pipe: a plain pipeline, as for `optimize`.
        passes: as for `optimize`.

    Raises:
        PlanError: the pipeline carries passes already, or the list cannot be applied; nothing was
            changed.
        PassError: a pass failed; everything was rolled back.
        BusyError: the pipeline is generating.
        RestoreError: at the end, some edits could not be undone; all others were.
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
    """Run with other settings of passes already applied, for the length of a `with` block.

    Nothing is applied, undone or compiled: only settings that a pass reads anew for each
    generation can change, such as a cache's threshold or schedule.

    Args:
        pipe: an optimized pipeline.
        settings: passes with the settings wanted, one or a list, or a preset's name. Each must be
            applied already; applied passes that are not named stay as they are.

    Raises:
        PlanError: a pass is not applied, or a setting cannot change at run time. Nothing
            was changed.
        BusyError: the pipeline is generating.
    """
    conductor = known_conductor(pipe)
    if conductor is None:
        raise PlanError("using() needs an optimized pipeline; call optimize(pipe) first")
    wanted = [settings] if malformed(settings) is None else settings
    swaps = retuned(conductor.live, Applications.of(conductor).passes, wanted)  # type: ignore[arg-type]
    before = [live.settings for live, _ in swaps]
    with conductor.idle("change settings"):
        for live, pass_ in swaps:
            live.settings = pass_
    try:
        yield pipe
    finally:  # also while another thread generates: settings are read where one begins
        for (live, _), old in zip(swaps, before, strict=True):
            live.settings = old


def report(pipe: Any) -> Report:
    """Say what was done to a pipeline and what its generations cost so far.

    Args:
        pipe: a Kontext pipeline; the report of a plain one is empty.

    Returns:
        The report. It prints as tables.

    Raises:
        PlanError: this is no Kontext pipeline.
    """
    conductor = known_conductor(pipe)
    if conductor is None:
        return Report()
    record = Applications.of(conductor)
    passes = tuple(
        replace(one, facts=dict(record.facts[one.name]())) if one.name in record.facts else one
        for one in record.reports
    )
    return Report(passes, record.warmup_seconds, tuple(record.statistics.runs))


def warmup(pipe: P, sizes: Sizes, references: Sizes | None = None, **call: Any) -> P:
    """Run the pipeline once for each output size, so that later calls find all compiled.

    Two denoising steps each, unless `call` says otherwise. The global random state is left
    alone. A progress bar tells sizes and phases, unless the pipeline's bars are disabled.
    Everything is checked before the first run.

    Args:
        pipe: an optimized pipeline.
        sizes: output sizes as (width, height) in pixels, multiples of 16; run exactly so,
            without Kontext's own rescaling to one megapixel. A list or any other iterable of
            pairs of whole numbers, which is read once: a generator or a NumPy array too.
        references: sizes of the reference pictures, each run with each output size; as
            `sizes`, but any whole numbers of 16 or more. None means one blank picture of the
            size that the pipeline gives a reference of the output's shape; an empty list
            means text-to-image only.
        **call: further arguments of the pipeline's call. Those that change shapes, such as
            the number of prompts or `max_sequence_length`, must be as they will be used.

    Returns:
        The same pipeline.

    Raises:
        PlanError: the pipeline is not optimized, there is no size or one that cannot be run,
            or an argument in `call` would overrule sizes or references. Nothing was run.
        PassError: a pass's `after_warmup` failed; what it did was rolled back.
        BusyError: the pipeline is generating.
    """
    conductor = known_conductor(pipe)
    if conductor is None:
        raise PlanError("warmup needs an optimized pipeline; call optimize(pipe) first")
    outputs = output_sizes(pipe, sizes)
    pictures = reference_sizes(pipe, references)
    check_call(call, pictures)
    record = Applications.of(conductor)
    began = time.perf_counter()
    calls = [(size, a) for size in outputs for a in blank_calls(pipe, size, pictures, call)]
    progress = Progress(pipe, len(calls))
    generate: Any = pipe
    with progress.shown(conductor), warmup_run(pipe):
        for size, arguments in calls:
            progress.begin(size)
            generate(**arguments)
    finish_warmup(pipe)
    record.warmup_seconds = (record.warmup_seconds or 0.0) + time.perf_counter() - began
    return pipe
