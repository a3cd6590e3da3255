"""optimize, restore, plan, report, warmup: the verbs of the library."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fluxfire import kontext, plugins, presets
from fluxfire.environment import environment
from fluxfire.errors import FluxfireError, PassError, PlanError, RestoreError
from fluxfire.generation import Conductor, conductor_of, shared_conductor
from fluxfire.planner import Plan, Step, configured, malformed, problems, workable
from fluxfire.protocol import Change, Pass, Target
from fluxfire.reporting import PassReport, Report
from fluxfire.statistics import Statistics
from fluxfire.transaction import Transaction
from fluxfire.warming import Size, blank_calls, check_sizes

P = TypeVar("P")
Passes = str | Iterable[Pass | str] | None


@dataclass
class _Record:
    """What was applied to one pipeline; kept on its conductor."""

    statistics: Statistics = field(default_factory=Statistics)
    passes: list[Pass] = field(default_factory=list)
    reports: list[PassReport] = field(default_factory=list)
    transactions: list[Transaction] = field(default_factory=list)
    warmup_seconds: float | None = None


def plan(pipe: Any, passes: Passes = None) -> Plan:
    """Say what `optimize` would do, and change nothing.

    Args:
        pipe: a `FluxKontextPipeline` or `FluxKontextInpaintPipeline`.
        passes: as for `optimize`.

    Returns:
        The plan. It prints as a table; `plan.ok` says whether `optimize` would go ahead.
    """
    wanted, wrong = _resolve(passes)
    if (why := kontext.unsupported(pipe)) is not None:
        return Plan(tuple(map(Step, wanted)), (why, *wrong))
    conductor = conductor_of(pipe)
    if conductor is None and shared_conductor(pipe.transformer) is not None:
        wrong.append(
            "this pipeline's transformer is already optimized through another pipeline; "
            "restore that one first"
        )
    applied = tuple(_record(conductor).passes) if conductor else ()
    wrong += problems([*applied, *wanted], applied=len(applied))

    data = tuple(map(configured, (*applied, *wanted)))
    traits = kontext.traits(pipe).union(*(_leaves(p) for p in applied))
    steps = []
    for pass_ in wanted:
        twin = any(p.name == pass_.name for p in applied)  # complained of already
        target = Target(pipe, environment(), data, traits)
        steps.append(Step(pass_, () if twin else tuple(pass_.check(target))))
        traits |= _leaves(pass_)
    result = Plan(tuple(steps), tuple(wrong), applied)
    if result.ok or not wanted or conductor is not None:
        return result
    rest = workable(wanted, refused=[s.pass_ for s in steps if s.refused])
    return Plan(result.steps, result.problems, applied, tuple(rest))


def optimize(pipe: P, passes: Passes = None) -> P:
    """Apply passes to a pipeline, in place.

    Every pass is checked before any is applied. A second call adds to the first.

    Args:
        pipe: a `FluxKontextPipeline` or `FluxKontextInpaintPipeline`.
        passes: passes in order, or the name of a preset; a string within the list is the
            name of a pass, used with its defaults. None means the preset `faithful`.

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
        BusyError: the pipeline is generating.
        RestoreError: some edits could not be undone; all others were.
    """
    conductor = conductor_of(pipe)
    if conductor is None:
        return pipe
    with conductor.idle("restore"):
        transactions = _record(conductor).transactions
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
    """Optimize for the length of a `with` block; takes back only what it applied itself."""
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


def report(pipe: Any) -> Report:
    """Say what was done to a pipeline and what its generations cost so far."""
    conductor = conductor_of(pipe)
    if conductor is None:
        return Report()
    record = _record(conductor)
    return Report(tuple(record.reports), record.warmup_seconds, tuple(record.statistics.runs))


def warmup(
    pipe: Any, sizes: Sequence[Size], references: Sequence[Size] | None = None, **call: Any
) -> Any:
    """Run the pipeline once for each output size, so that later calls find all compiled.

    Two denoising steps each, unless `call` says otherwise. The global random state is left
    alone.

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
    """
    conductor = conductor_of(pipe)
    if conductor is None:
        raise PlanError("warmup needs an optimized pipeline; call optimize(pipe) first")
    check_sizes(pipe, sizes)
    record = _record(conductor)
    began = time.perf_counter()
    for size in sizes:
        for arguments in blank_calls(pipe, size, references, call):
            pipe(**arguments)
    with conductor.idle("finish the warm-up"):
        tx = Transaction(pipe, conductor)
        record.transactions.append(tx)
        for pass_ in record.passes:
            if (after := getattr(pass_, "after_warmup", None)) is not None:
                after(tx)
    record.warmup_seconds = (record.warmup_seconds or 0.0) + time.perf_counter() - began
    return pipe


def _apply(pipe: Any, passes: Passes, transaction: Callable[[Any, Conductor], Transaction]) -> None:
    """Carry `optimize` out; `transaction` makes the transaction."""
    planned = plan(pipe, passes)
    planned.raise_if_bad()
    conductor = conductor_of(pipe) or Conductor()
    with conductor.idle("optimize"):
        record = conductor.record = conductor.record or _Record()
        tx = transaction(pipe, conductor)
        applied, reports = [], []
        current = "fluxfire"
        try:
            if conductor_of(pipe) is None:
                tx.set_class(pipe, conductor.pipeline_class(pipe))
                tx.setattr(pipe.transformer, kontext.CALL_SLOT, conductor.transformer_call(pipe))
                tx.listen(record.statistics)
            for step in planned.steps:
                current = step.pass_.name
                began = time.perf_counter()
                change = _checked(step.pass_.apply(tx))
                seconds = time.perf_counter() - began
                applied.append(step.pass_)
                reports.append(PassReport.of(step.pass_, change, seconds, step.findings))
        except BaseException as error:
            failures = tx.rollback()
            for failure in failures:
                error.add_note(f"rolling back also failed: {failure!r} {failure.__notes__}")
            if not isinstance(error, Exception):
                raise
            raise PassError(
                f"{current} failed while it was applied ({type(error).__name__}: {error}); "
                f"everything was rolled back",
                pass_name=current,
            ) from error
        record.transactions.append(tx)
        record.passes += applied
        record.reports += reports


def _checked(change: object) -> Change:
    if not isinstance(change, Change):
        raise TypeError(f"apply() returned {change!r}, not a fluxfire.Change")
    return change


def _resolve(passes: Passes) -> tuple[list[Pass], list[str]]:
    """Turn names into passes; return the well-formed passes and what is wrong with the rest."""
    if passes is None:
        passes = "faithful"
    if isinstance(passes, str):
        passes = presets.named(passes)
    if not isinstance(passes, Iterable):
        hint = malformed(passes)
        single = f"; did you mean passes=[{passes!r}]?" if hint is None else ""
        raise PlanError(f"passes must be a list or a preset's name, not {passes!r}{single}")
    found, wrong = [], []
    for entry in passes:
        if isinstance(entry, str):
            found.append(plugins.find(entry)())
        elif (why := malformed(entry)) is not None:
            wrong.append(why)
        else:
            found.append(entry)
    return found, wrong


def _leaves(pass_: Pass) -> frozenset[str]:
    return frozenset(getattr(pass_, "leaves", ()))


def _record(conductor: Conductor) -> _Record:
    record = conductor.record
    if not isinstance(record, _Record):
        raise FluxfireError("this pipeline's record is gone; reload the pipeline")
    return record
