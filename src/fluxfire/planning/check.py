"""Makes a plan: finds conflicts in a list of passes, and runs the check of every pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from fluxfire import modules
from fluxfire.diffusers_types import DiffusersPipeline, Pipeline
from fluxfire.environment import environment
from fluxfire.planning.plan import Plan, Step
from fluxfire.planning.resolve import Passes, resolve_entries
from fluxfire.planning.rules import find_conflicts
from fluxfire.planning.suggest import suggest
from fluxfire.protocol import Finding, Pass, Target, configured, provided_traits
from fluxfire.runtime.conductor import conductor_of, conductor_of_transformer
from fluxfire.supported import refusal


def make_plan(pipe: DiffusersPipeline, passes: Passes, applied: Sequence[Pass]) -> Plan:
    """Plan the application of passes. Changes nothing.

    Args:
        pipe: any object; the plan of anything but a Kontext pipeline has a problem.
        passes: as for `fluxfire.optimize`.
        applied: the passes that the pipeline already carries.

    Raises:
        PlanError: there is no such preset, a file cannot be read, or `passes` is no list.
    """
    entries = resolve_entries(passes)
    problems = [message for entry in entries for message in entry.errors]
    steps = [Step(p, faults=entry.errors) for entry in entries for p in entry.passes]
    if (why := refusal(pipe) or _why_unusable(pipe, applied)) is not None:
        unchecked = (replace(step, faults=(why, *step.faults)) for step in steps)
        return Plan(tuple(unchecked), (why, *problems), tuple(applied))
    requested = [step.pass_ for step in steps]
    for index, message in find_conflicts([*applied, *requested], applied=len(applied)):
        step = steps[index - len(applied)]
        steps[index - len(applied)] = replace(step, faults=(*step.faults, message))
        problems.append(message)
    checked = _run_checks(pipe, applied, requested)
    steps = [replace(s, findings=c.findings) for s, c in zip(steps, checked, strict=True)]
    plan = Plan(tuple(steps), tuple(dict.fromkeys(problems)), tuple(applied))
    if plan.ok:
        return plan
    suggestion, left_out = suggest(
        requested, applied, lambda passes: _run_checks(pipe, applied, passes)
    )
    unknown = (f"{e.written!r}, because it is no pass" for e in entries if not e.passes)
    return replace(plan, suggestion=suggestion, left_out=(*unknown, *left_out))


def _why_unusable(pipe: Pipeline, applied: Sequence[Pass]) -> str | None:
    """Return the reason why fluxfire cannot work on a Kontext pipeline now; None if it can."""
    conductor = conductor_of(pipe)
    if conductor is not None and (why := conductor.why_unusable(pipe)) is not None:
        return why
    if conductor is None and conductor_of_transformer(pipe.transformer) is not None:
        return (
            "this pipeline's transformer is already optimized through another pipeline; "
            "restore that one first, or if you no longer have it, call restore(pipe, shared=True)"
        )
    # Such a cache patches the transformer's class and calls the blocks itself, so no pass would
    # see them run.
    if "foreign-cache" in modules.cache_traits(pipe.transformer):
        return "; ".join(modules.FOREIGN_CACHE)
    ours = any("context-parallel" in provided_traits(p) for p in applied)
    if modules.runs_on_several_gpus(pipe.transformer) and not ours:
        return (
            "the transformer runs on several GPUs already, outside fluxfire "
            "(enable_parallelism()), where passes cannot see all of its tokens; load the pipeline "
            "without it, and add ContextParallel() to the passes, which does the same"
        )
    return None


def _run_checks(pipe: Pipeline, applied: Sequence[Pass], requested: Sequence[Pass]) -> list[Step]:
    """Run the check of every requested pass.

    Each check sees the whole list, and the traits that hold after the passes before it.
    """
    whole_list = tuple(map(configured, (*applied, *requested)))
    traits = modules.traits(pipe).union(*map(provided_traits, applied))
    steps = []
    for index, pass_ in enumerate(requested):
        others = (*applied, *requested[:index])
        is_duplicate = any(p.name == pass_.name for p in others)  # `find_conflicts` reports it
        target = Target(pipe, environment(), whole_list, traits)
        findings: tuple[Finding, ...] = ()
        if not is_duplicate:
            findings = (*_run_check(pass_, target), *_refuse_one_graph(pass_, pipe))
        steps.append(Step(pass_, findings))
        traits |= provided_traits(pass_)
    return steps


def _refuse_one_graph(pass_: Pass, pipe: Pipeline) -> Iterator[Finding]:
    """Refuse a pass that wraps the blocks if the user compiled the whole transformer."""
    if "wraps-blocks" in provided_traits(pass_) and modules.is_compiled(pipe.transformer):
        yield Finding(
            "error",
            "the whole transformer is compiled, outside fluxfire, and one graph cannot contain the "
            "wrapper that this pass puts around the blocks",
            "leave that compile() out, and use Compile()",
        )


def _run_check(pass_: Pass, target: Target) -> tuple[Finding, ...]:
    """Run the check of one pass. An error in the check itself becomes a finding."""
    remedy = "this is a fault of the pass; leave it out"
    try:
        findings = tuple(pass_.check(target))
    except Exception as error:  # noqa: BLE001 - a pass is anybody's code, and the plan names it
        message = f"its check() failed with {type(error).__name__}: {error}"
        return (Finding("error", message, remedy),)
    for finding in findings:
        if not isinstance(finding, Finding):
            return (Finding("error", f"its check() gave {finding!r}, not a Finding", remedy),)
    return findings
