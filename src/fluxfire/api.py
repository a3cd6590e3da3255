"""optimize, restore, plan, report, warmup: the verbs of the library."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from fluxfire import kontext
from fluxfire.conductor import Conductor, conductor_of, rehearsal
from fluxfire.errors import FluxfireError, PassError, PlanError, RestoreError
from fluxfire.live_settings import retuned
from fluxfire.planner import Plan, configured, malformed
from fluxfire.protocol import Change, Pass
from fluxfire.reporting.report import PassReport, Report
from fluxfire.reporting.statistics import Statistics
from fluxfire.resolve import Passes, make_plan
from fluxfire.transaction import Transaction
from fluxfire.warming import Progress, Size, blank_calls, check_call, check_sizes

P = TypeVar("P")
_one_at_a_time = threading.RLock()  # planned and applied without another thread in between


@dataclass
class _Record:
    """What was applied to one pipeline; kept on its conductor."""

    statistics: Statistics = field(default_factory=Statistics)
    passes: list[Pass] = field(default_factory=list)
    reports: list[PassReport] = field(default_factory=list)
    facts: dict[str, Callable[[], Mapping[str, object]]] = field(default_factory=dict)
    transactions: list[Transaction] = field(default_factory=list)
    warmup_seconds: float | None = None


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
    conductor = conductor_of(pipe)
    applied = _record(conductor).passes if conductor else ()
    return make_plan(pipe, passes, applied)


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
    _apply(pipe, passes, Transaction)
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
    conductor = _conductor(pipe)
    if conductor is None:
        return pipe
    with conductor.idle("restore"), _editing():
        transactions = _record(conductor).transactions
        if kept := [why for tx in transactions for why in tx.kept]:
            raise PlanError(
                f"{'; '.join(kept)}. Nothing was changed; to have it back, load the pipeline again"
            )
        failures = [e for tx in reversed(transactions) for e in tx.rollback()]
        transactions.clear()
    if failures:
        said = "; ".join(f"{type(e).__name__}: {e}" for e in failures)
        raise RestoreError(
            f"{len(failures)} edits could not be undone ({said}); all others were. "
            f"Reload the pipeline to be safe",
            failures=tuple(failures),
        ) from failures[0]
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
    conductor = conductor_of(pipe)
    before = len(_record(conductor).passes) if conductor else 0
    if before:
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
    conductor = _conductor(pipe)
    if conductor is None:
        raise PlanError("using() needs an optimized pipeline; call optimize(pipe) first")
    wanted = [settings] if malformed(settings) is None else settings
    swaps = retuned(conductor.live, _record(conductor).passes, wanted)  # type: ignore[arg-type]
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
    conductor = _conductor(pipe)
    if conductor is None:
        return Report()
    record = _record(conductor)
    passes = tuple(
        replace(one, facts=dict(record.facts[one.name]())) if one.name in record.facts else one
        for one in record.reports
    )
    return Report(passes, record.warmup_seconds, tuple(record.statistics.runs))


def warmup(
    pipe: P, sizes: Sequence[Size], references: Sequence[Size] | None = None, **call: Any
) -> P:
    """Run the pipeline once for each output size, so that later calls find all compiled.

    Two denoising steps each, unless `call` says otherwise. The global random state is left
    alone. A progress bar tells sizes and phases, unless the pipeline's bars are disabled.

    Args:
        pipe: an optimized pipeline.
        sizes: output sizes as (width, height) in pixels, multiples of 16; run exactly so,
            without Kontext's own rescaling to one megapixel.
        references: sizes of the reference pictures, each run with each output size. None
            means one blank picture of the size that the pipeline gives a reference of the
            output's shape; an empty list means text-to-image only.
        **call: further arguments of the pipeline's call. Those that change shapes, such as
            the number of prompts or `max_sequence_length`, must be as they will be used.

    Returns:
        The same pipeline.

    Raises:
        PlanError: the pipeline is not optimized, or a size cannot be run.
        PassError: a pass's `after_warmup` failed; what it did was rolled back.
        BusyError: the pipeline is generating.
    """
    conductor = _conductor(pipe)
    if conductor is None:
        raise PlanError("warmup needs an optimized pipeline; call optimize(pipe) first")
    check_sizes(pipe, sizes, references or ())
    check_call(call)
    record = _record(conductor)
    began = time.perf_counter()
    calls = [(size, a) for size in sizes for a in blank_calls(pipe, size, references, call)]
    progress = Progress(pipe, len(calls))
    generate: Any = pipe
    with progress.shown(conductor), rehearsal(pipe):
        for size, arguments in calls:
            progress.begin(size)
            generate(**arguments)
    finish_warmup(pipe)
    record.warmup_seconds = (record.warmup_seconds or 0.0) + time.perf_counter() - began
    return pipe


def _apply(pipe: Any, passes: Passes, transaction: Callable[[Any, Conductor], Transaction]) -> None:
    """Carry `optimize` out; `transaction` makes the transaction."""
    with _one_at_a_time:
        planned = plan(pipe, passes)
        planned.raise_if_bad()
        _carry_out(pipe, planned, transaction)


def _carry_out(
    pipe: Any, planned: Plan, transaction: Callable[[Any, Conductor], Transaction]
) -> None:
    conductor = conductor_of(pipe) or Conductor()
    with conductor.idle("optimize"), _editing():
        record = conductor.record = conductor.record or _Record()
        tx = transaction(pipe, conductor)
        reports: list[PassReport] = []
        facts: dict[str, Callable[[], Mapping[str, object]]] = {}
        with _all_or_nothing(tx):
            if conductor_of(pipe) is None:
                with _naming("fluxfire"):
                    tx.set_class(pipe, conductor.pipeline_class(pipe))
                    call = conductor.transformer_call(pipe)
                    tx.setattr(pipe.transformer, kontext.CALL_SLOT, call)
                    tx.listen(record.statistics)
            for step in planned.steps:
                began, tx.facts = time.perf_counter(), None
                with _naming(step.pass_.name):
                    change = _checked(step.pass_.apply(tx))
                seconds = time.perf_counter() - began
                reports.append(PassReport.of(step.pass_, change, seconds, step.findings))
                if tx.facts is not None:
                    facts[step.pass_.name] = tx.facts
        record.transactions.append(tx)
        record.passes += [step.pass_ for step in planned.steps]
        record.reports += reports
        record.facts |= facts
        conductor.passes = tuple(map(configured, record.passes))


def finish_warmup(pipe: Any) -> None:
    """Let the passes do what only a pipeline that has run allows: `after_warmup`.

    `warmup` does this; call it where a pipeline was warmed up in another way.

    Raises:
        PlanError: the pipeline is not optimized.
        PassError: a pass's `after_warmup` failed; what it did was rolled back.
        BusyError: the pipeline is generating.
    """
    conductor = conductor_of(pipe)
    if conductor is None:
        raise PlanError("only an optimized pipeline can finish a warm-up; call optimize(pipe)")
    record = _record(conductor)
    with conductor.idle("finish the warm-up"), _editing():
        tx = Transaction(pipe, conductor)
        with _all_or_nothing(tx):
            for pass_ in record.passes:
                if (after := getattr(pass_, "after_warmup", None)) is not None:
                    with _naming(pass_.name):
                        after(tx)
        record.transactions.append(tx)


@contextmanager
def _editing() -> Iterator[None]:
    """Make tensors that are good for anything, also where the user is in inference mode."""
    with torch.inference_mode(mode=False), torch.no_grad():
        yield


@contextmanager
def _all_or_nothing(tx: Transaction) -> Iterator[None]:
    """Roll the transaction back if anything is raised, interrupts included."""
    try:
        yield
    except BaseException as error:
        failures = tx.rollback()
        for failure in failures:
            error.add_note(f"rolling back also failed: {failure!r} {failure.__notes__}")
        if not isinstance(error, PassError):
            raise
        outcome = (
            f"{len(failures)} edits could not be undone; reload the pipeline to be safe"
            if failures
            else "everything was rolled back"
        )
        error.args = (f"{error}; {outcome}",)
        raise


@contextmanager
def _naming(pass_name: str) -> Iterator[None]:
    """Turn what a pass raises into a PassError that names it."""
    try:
        yield
    except Exception as error:
        raise PassError(
            f"{pass_name} failed while it was applied ({type(error).__name__}: {error})",
            pass_name=pass_name,
        ) from error


def _checked(change: object) -> Change:
    if not isinstance(change, Change):
        raise TypeError(f"apply() returned {change!r}, not a fluxfire.Change")
    return change


def _conductor(pipe: object) -> Conductor | None:
    """Return a pipeline's conductor, or None for a plain one; refuse what is no pipeline."""
    if not isinstance(pipe, kontext.PIPELINES):
        raise PlanError(str(kontext.unsupported(pipe)))
    return conductor_of(pipe)


def _record(conductor: Conductor) -> _Record:
    record = conductor.record
    if not isinstance(record, _Record):
        raise FluxfireError("this pipeline's record is gone; reload the pipeline")
    return record
