"""How passes are applied: a plan as one transaction, what was done on record, and undone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from fluxfire import modules
from fluxfire.errors import PassError, PlanError, RestoreError
from fluxfire.planning.check import make_plan
from fluxfire.planning.plan import Plan
from fluxfire.planning.resolve import Passes
from fluxfire.protocol import Change, Pass, configured
from fluxfire.reporting.applications import Application, Applications
from fluxfire.reporting.report import PassReport
from fluxfire.runtime.conductor import Conductor, TransformerCall, conductor_of, private_class
from fluxfire.runtime.copies import copier
from fluxfire.runtime.transaction import Transaction
from fluxfire.runtime.turns import Turns
from fluxfire.supported import MODELS, model_of, refusal

MakeTransaction = Callable[[Any, Conductor], Transaction]
_one_at_a_time = Turns()  # planned and applied without another thread in between


def known_conductor(pipe: object) -> Conductor | None:
    """Return a pipeline's conductor, or None for a plain one.

    Raises:
        PlanError: this is no Kontext pipeline.
    """
    if not isinstance(pipe, tuple(p for model in MODELS for p in model.pipelines)):
        raise PlanError(str(refusal(pipe)))
    return conductor_of(pipe)


def applied_passes(pipe: object) -> list[Pass]:
    """Return the passes that a pipeline carries, in order; none of a plain one."""
    conductor = conductor_of(pipe)
    return Applications.of(conductor).passes if conductor else []


def apply_passes(pipe: Any, passes: Passes, transaction: MakeTransaction = Transaction) -> None:
    """Plan, and apply what was planned; see `fluxfire.optimize`.

    Args:
        pipe: the pipeline.
        passes: as for `optimize`.
        transaction: makes the transaction; `fluxfire.testing` puts in one that fails.

    Raises:
        PlanError: the list cannot be applied; nothing was changed.
        PassError: a pass failed; everything this call did was rolled back.
        BusyError: the pipeline is generating.
    """
    with _one_at_a_time.wait():
        planned = make_plan(pipe, passes, applied_passes(pipe))
        planned.raise_if_bad()
        _carry_out(pipe, planned, transaction)


def undo(conductor: Conductor) -> None:
    """Undo everything that was done to a conductor's pipeline; see `fluxfire.restore`.

    An interrupt leaves what is not undone yet for the next call.

    Raises:
        PlanError: a pass let go of what it would need; nothing was changed.
        BusyError: the pipeline is generating.
        RestoreError: some edits could not be undone; all others were.
    """
    with conductor.idle("restore"), _editing():
        record = Applications.of(conductor)
        if gone := record.irreversible:
            raise PlanError(
                f"{'; '.join(gone)}. Nothing was changed; to have it back, load the pipeline again"
            )
        conductor.changing = True
        failures = [e for tx in reversed(record.transactions) for e in tx.rollback()]
        record.applied.clear()
    if failures:
        said = "; ".join(f"{type(e).__name__}: {e}" for e in failures)
        raise RestoreError(
            f"{len(failures)} edits could not be undone ({said}); all others were. "
            f"Reload the pipeline to be safe",
            failures=tuple(failures),
        ) from failures[0]


def finish_warmup(pipe: Any) -> None:
    """Let the passes do what only a pipeline that has run allows: `after_warmup`.

    Args:
        pipe: an optimized pipeline.

    Raises:
        PlanError: the pipeline is not optimized.
        PassError: a pass's `after_warmup` failed; what it did was rolled back.
        BusyError: the pipeline is generating.
    """
    conductor = conductor_of(pipe)
    if conductor is None:
        raise PlanError("only an optimized pipeline can finish a warm-up; call optimize(pipe)")
    with conductor.idle("finish the warm-up"), _editing():
        tx = Transaction(pipe, conductor)
        with _all_or_nothing(conductor, Application(tx)):
            for pass_ in Applications.of(conductor).passes:
                if (after := getattr(pass_, "after_warmup", None)) is not None:
                    with _naming(pass_.name):
                        after(tx)


def _carry_out(pipe: Any, planned: Plan, transaction: MakeTransaction) -> None:
    known = conductor_of(pipe)
    conductor = known or Conductor(pipe, model_of(pipe), Applications())
    with conductor.idle("optimize"), _editing():
        tx = transaction(pipe, conductor)
        done = Application(tx)
        reports: list[PassReport] = []
        facts: dict[str, Callable[[], Mapping[str, object]]] = {}
        with _all_or_nothing(conductor, done):
            if known is None:
                with _naming("fluxfire"):
                    _take_over(tx, conductor)
            for step in planned.steps:
                began, tx.facts = time.perf_counter(), None
                with _naming(step.pass_.name):
                    change = _checked(step.pass_.apply(tx))
                seconds = time.perf_counter() - began
                reports.append(PassReport.of(step.pass_, change, seconds, step.findings))
                if tx.facts is not None:
                    facts[step.pass_.name] = tx.facts
            done.reports, done.facts = tuple(reports), facts
            done.passes = tuple(step.pass_ for step in planned.steps)


def _take_over(tx: Transaction, conductor: Conductor) -> None:
    """Have the conductor hear of the pipeline's calls, and see to its copies."""
    pipe, record = tx.pipe, Applications.of(conductor)
    # First of all: from now on restore(pipe) finds the record, also after an interrupt.
    tx.set_class(pipe, private_class(pipe, conductor))
    tx.on_undo(partial(conductor.model.unmount, pipe.transformer))
    tx.place(TransformerCall(conductor, pipe))
    for _, component in modules.components(pipe):
        for override in copier(component, pipe, record):
            tx.place(override)
    tx.listen(record.statistics)


@contextmanager
def _editing() -> Iterator[None]:
    """Make tensors that are good for anything, also where the user is in inference mode."""
    with torch.inference_mode(mode=False), torch.no_grad():
        yield


@contextmanager
def _all_or_nothing(conductor: Conductor, application: Application) -> Iterator[None]:
    """Roll an application back if anything is raised, interrupts included.

    It is on record from the start. If another interrupt cuts the roll-back short, `restore` finds
    there what is left to do.
    """
    record = Applications.of(conductor)
    applied = record.applied
    try:
        conductor.changing = True
        applied.append(application)
        yield
        conductor.passes = tuple(map(configured, record.passes))
        conductor.changing = False
    except BaseException as error:
        application.passes = ()
        failures = application.transaction.rollback()
        if application in applied:
            applied.remove(application)
        conductor.passes = tuple(map(configured, record.passes))
        conductor.changing = False
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
