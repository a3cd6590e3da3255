"""From a list of passes to a plan: order looked at, every check run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from fluxfire import modules
from fluxfire.environment import environment
from fluxfire.planning.plan import Plan, Step
from fluxfire.planning.resolve import Passes, entries
from fluxfire.planning.rules import faults
from fluxfire.planning.suggest import suggest
from fluxfire.protocol import Finding, Pass, Target, configured, provided_traits
from fluxfire.runtime.conductor import conductor_of, shared_conductor
from fluxfire.supported import refusal


def make_plan(pipe: Any, passes: Passes, applied: Sequence[Pass]) -> Plan:
    """Say what applying passes would do.

    Args:
        pipe: what is hoped to be a Kontext pipeline.
        passes: as for `fluxfire.optimize`.
        applied: the passes that the pipeline carries already.
    """
    read = entries(passes)
    wrong = [line for entry in read for line in entry.wrong]
    wanted = [Step(p, faults=entry.wrong) for entry in read for p in entry.meant]
    if (why := refusal(pipe) or _disturbed(pipe)) is not None:
        unchecked = (replace(step, faults=(why, *step.faults)) for step in wanted)
        return Plan(tuple(unchecked), (why, *wrong), tuple(applied))
    asked = [step.pass_ for step in wanted]
    for index, said in faults([*applied, *asked], applied=len(applied)):
        step = wanted[index - len(applied)]
        wanted[index - len(applied)] = replace(step, faults=(*step.faults, said))
        wrong.append(said)
    checked = _checked(pipe, applied, asked)
    steps = (replace(w, findings=c.findings) for w, c in zip(wanted, checked, strict=True))
    result = Plan(tuple(steps), tuple(dict.fromkeys(wrong)), tuple(applied))
    if result.ok:
        return result
    suggestion, left_out = suggest(asked, applied, lambda passes: _checked(pipe, applied, passes))
    unknown = (f"{e.written!r}, because it is no pass" for e in read if not e.meant)
    return replace(result, suggestion=suggestion, left_out=(*unknown, *left_out))


def _disturbed(pipe: Any) -> str | None:
    """Say what keeps fluxfire from working on this pipeline now, or None."""
    owner = conductor_of(pipe)
    if owner is not None and (why := owner.disturbed(pipe)) is not None:
        return why
    if owner is None and shared_conductor(pipe.transformer) is not None:
        return (
            "this pipeline's transformer is already optimized through another pipeline; "
            "restore that one first"
        )
    if "foreign-cache" in modules.cache_traits(pipe.transformer):
        return "; ".join(modules.FOREIGN_CACHE)  # it patches the class, and calls blocks itself
    if getattr(pipe.transformer, "_parallel_config", None) is not None:
        return (
            "the transformer runs on several GPUs (enable_parallelism()), and no pass knows of the "
            "parts that the other GPUs have; load the pipeline without it"
        )
    return None


def _checked(pipe: Any, applied: Sequence[Pass], wanted: Sequence[Pass]) -> list[Step]:
    """Run every pass's check, each knowing the whole list and what earlier passes leave."""
    data = tuple(map(configured, (*applied, *wanted)))
    traits = modules.traits(pipe).union(*map(provided_traits, applied))
    steps = []
    for index, pass_ in enumerate(wanted):
        others = (*applied, *wanted[:index])
        twin = any(p.name == pass_.name for p in others)  # complained of already
        target = Target(pipe, environment(), data, traits)
        findings = () if twin else (*_findings(pass_, target), *_in_one_graph(pass_, pipe))
        steps.append(Step(pass_, findings))
        traits |= provided_traits(pass_)
    return steps


def _in_one_graph(pass_: Pass, pipe: Any) -> Iterator[Finding]:
    """Refuse what decides between the blocks where the user compiled the whole transformer."""
    if "wraps-blocks" in provided_traits(pass_) and modules.is_compiled(pipe.transformer):
        yield Finding(
            "error",
            "the whole transformer is compiled, outside fluxfire, and one graph of it cannot hold "
            "what decides between the blocks",
            "leave that compile() out, and use Compile()",
        )


def _findings(pass_: Pass, target: Target) -> tuple[Finding, ...]:
    fault = "this is a fault of the pass; leave it out"
    try:
        findings = tuple(pass_.check(target))
    except Exception as error:  # noqa: BLE001 - anyone's code; the plan must name it
        said = f"its check() failed with {type(error).__name__}: {error}"
        return (Finding("error", said, fault),)
    for finding in findings:
        if not isinstance(finding, Finding):
            return (Finding("error", f"its check() gave {finding!r}, not a Finding", fault),)
    return findings
