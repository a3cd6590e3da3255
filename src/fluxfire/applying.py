"""Applies the passes of a plan in one transaction, keeps a record, and undoes it."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from fluxfire import modules
from fluxfire.diffusers_types import DiffusersPipeline, Pipeline
from fluxfire.errors import FluxfireError, FluxfireWarning, PassError, PlanError, RestoreError
from fluxfire.planning.check import make_plan
from fluxfire.planning.plan import Plan
from fluxfire.planning.resolve import Passes, resolve_entries
from fluxfire.protocol import Change, Pass, configured
from fluxfire.reporting.applications import Application, Applications
from fluxfire.reporting.report import PassReport
from fluxfire.runtime.conductor import Conductor, TransformerCall, conductor_of, make_private_class
from fluxfire.runtime.copies import copy_overrides
from fluxfire.runtime.transaction import Transaction
from fluxfire.runtime.turns import Turns
from fluxfire.supported import find_model, model_of, refusal

MakeTransaction = Callable[[Pipeline, Conductor], Transaction]
logger = logging.getLogger("fluxfire")
_one_at_a_time = Turns()  # no other thread may apply passes between planning and applying


def find_conductor(pipe: object) -> Conductor | None:
    """Return the conductor of a Kontext pipeline; None for a plain one.

    Raises:
        PlanError: this is no Kontext pipeline.
    """
    if find_model(pipe) is None:
        raise PlanError(str(refusal(pipe)))
    return conductor_of(pipe)


def applied_passes(pipe: object) -> list[Pass]:
    """Return the passes that a pipeline carries, in order; an empty list for a plain pipeline."""
    conductor = conductor_of(pipe)
    return Applications.of(conductor).passes if conductor else []


def apply_passes(
    pipe: DiffusersPipeline, passes: Passes, transaction: MakeTransaction = Transaction
) -> None:
    """Make a plan, and carry it out; see `fluxfire.optimize`.

    Args:
        pipe: the pipeline.
        passes: as for `optimize`.
        transaction: creates the transaction; `fluxfire.testing` gives one that fails.

    Raises:
        PlanError: the list cannot be applied. Nothing was changed.
        PassError: a pass failed. Everything that this call did was rolled back.
        BusyError: the pipeline is generating.
    """
    with _one_at_a_time.wait():
        plan = make_plan(pipe, passes, applied_passes(pipe))
        plan.raise_if_bad()
        _apply_plan(pipe, plan, transaction)
    for step in plan.steps:
        for finding in step.findings:
            if finding.level == "warning":
                message = f"{step.pass_.name}: {finding}"
                warnings.warn(message, FluxfireWarning, stacklevel=_stacklevel_of_user())


def replace_passes(pipe: DiffusersPipeline, passes: Passes) -> None:
    """Undo the applied passes, and apply other passes; see `fluxfire.optimize`.

    Raises:
        PlanError: as for `apply_passes` and `undo`.
        PassError: as for `apply_passes`.
        BusyError: the pipeline is generating.
        RestoreError: some edits could not be undone.
    """
    conductor = find_conductor(pipe)
    before = applied_passes(pipe)
    if conductor is not None:
        resolve_entries(passes)  # raises for an unknown preset before anything is undone
        undo(conductor)
    try:
        apply_passes(pipe, passes)
    except FluxfireError as error:
        if before:
            apply_passes(pipe, before)
            error.add_note("the passes that the pipeline carried before are applied again")
        raise


def undo(conductor: Conductor) -> None:
    """Undo all edits of a conductor's pipeline; see `fluxfire.restore`.

    After an interrupt, another call undoes the remaining edits.

    Raises:
        PlanError: the edits are irreversible. Nothing was changed.
        BusyError: the pipeline is generating.
        RestoreError: some edits could not be undone; all others were.
    """
    with conductor.while_idle("restore"), _outside_inference_mode():
        record = Applications.of(conductor)
        if reasons := record.irreversible:
            raise PlanError(
                f"{'; '.join(reasons)}. Nothing was changed; "
                f"to get the plain pipeline, load it again"
            )
        conductor.changing = True
        failures = [e for tx in reversed(record.transactions) for e in tx.rollback()]
        record.applied.clear()
    if failures:
        errors = "; ".join(f"{type(e).__name__}: {e}" for e in failures)
        raise RestoreError(
            f"{len(failures)} edits could not be undone ({errors}); all others were. "
            f"Reload the pipeline to be safe",
            failures=tuple(failures),
        ) from failures[0]


def finish_warmup(pipe: Pipeline) -> None:
    """Call `after_warmup` of every pass that has it.

    Args:
        pipe: an optimized pipeline, which has run.

    Raises:
        PlanError: the pipeline is not optimized.
        PassError: a pass's `after_warmup` failed. Its edits were rolled back.
        BusyError: the pipeline is generating.
    """
    conductor = conductor_of(pipe)
    if conductor is None:
        raise PlanError("only an optimized pipeline can finish a warm-up; call optimize(pipe)")
    with conductor.while_idle("finish the warm-up"), _outside_inference_mode():
        tx = Transaction(pipe, conductor)
        with _all_or_nothing(conductor, Application(tx)):
            for pass_ in Applications.of(conductor).passes:
                if (after_warmup := getattr(pass_, "after_warmup", None)) is not None:
                    with _errors_as_pass_error(pass_.name):
                        after_warmup(tx)


def _apply_plan(pipe: Pipeline, plan: Plan, transaction: MakeTransaction) -> None:
    present = conductor_of(pipe)
    conductor = present or Conductor(pipe, model_of(pipe), Applications())
    with conductor.while_idle("optimize"), _outside_inference_mode():
        tx = transaction(pipe, conductor)
        application = Application(tx)
        reports: list[PassReport] = []
        facts: dict[str, Callable[[], Mapping[str, object]]] = {}
        with _all_or_nothing(conductor, application):
            if present is None:
                with _errors_as_pass_error("fluxfire"):
                    _install_conductor(tx, conductor)
            for step in plan.steps:
                began, tx.facts = time.perf_counter(), None
                with _errors_as_pass_error(step.pass_.name):
                    change = _require_change(step.pass_.apply(tx))
                seconds = time.perf_counter() - began
                reports.append(PassReport.of(step.pass_, change, seconds, step.findings))
                logger.info("%s", reports[-1])
                if tx.facts is not None:
                    facts[step.pass_.name] = tx.facts
            application.reports, application.facts = tuple(reports), facts
            application.passes = tuple(step.pass_ for step in plan.steps)


def _install_conductor(tx: Transaction, conductor: Conductor) -> None:
    """Make the pipeline and its transformer call the conductor, and make copies plain."""
    pipe, record = tx.pipe, Applications.of(conductor)
    # This must be the first edit: restore(pipe) finds the record through the class, and must find
    # it even after an interrupt.
    tx.set_class(pipe, make_private_class(pipe, conductor))
    tx.on_undo(partial(conductor.model.unmount, pipe.transformer))
    tx.place(TransformerCall(conductor, pipe))
    for _, component in modules.components(pipe):
        for override in copy_overrides(component, pipe, record):
            tx.place(override)
    tx.listen(record.statistics)


def _stacklevel_of_user() -> int:
    """Return the `stacklevel` with which a warning names the user's line, not fluxfire's."""
    ours = (str(Path(__file__).parent), contextlib.__file__)
    frame, count = sys._getframe(1), 1  # noqa: SLF001
    while frame.f_code.co_filename.startswith(ours) and frame.f_back is not None:
        frame, count = frame.f_back, count + 1
    return count


@contextmanager
def _outside_inference_mode() -> Iterator[None]:
    """Create normal tensors inside the block, even if the user is in inference mode.

    Inference tensors could not be used outside inference mode later.
    """
    with torch.inference_mode(mode=False), torch.no_grad():
        yield


@contextmanager
def _all_or_nothing(conductor: Conductor, application: Application) -> Iterator[None]:
    """Roll an application back if the block raises anything, even KeyboardInterrupt.

    The record has the application from the start. If another interrupt cuts the rollback short,
    `restore` finds the remaining edits there.
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
def _errors_as_pass_error(pass_name: str) -> Iterator[None]:
    """Raise exceptions of a pass as a PassError with the pass's name."""
    try:
        yield
    except Exception as error:
        raise PassError(
            f"{pass_name} failed while it was applied ({type(error).__name__}: {error})",
            pass_name=pass_name,
        ) from error


def _require_change(change: object) -> Change:
    if not isinstance(change, Change):
        raise TypeError(f"apply() returned {change!r}, not a fluxfire.Change")
    return change
