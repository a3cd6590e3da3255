"""From what the user asks for to a plan: names resolved, order looked at, every check run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fluxfire import kontext, plugins, presets, recipes
from fluxfire.conductor import conductor_of, shared_conductor
from fluxfire.environment import environment
from fluxfire.errors import PlanError
from fluxfire.planner import Plan, Step, configured, malformed, problems, workable
from fluxfire.protocol import Finding, Pass, Target

Passes = str | Path | Iterable[Pass | str] | None


def make_plan(pipe: Any, passes: Passes, applied: Sequence[Pass]) -> Plan:
    """Say what applying passes would do.

    Args:
        pipe: what is hoped to be a Kontext pipeline.
        passes: as for `fluxfire.optimize`.
        applied: the passes that the pipeline carries already.
    """
    wanted, wrong = resolve(passes)
    if (why := kontext.unsupported(pipe) or _disturbed(pipe)) is not None:
        return Plan(tuple(map(Step, wanted)), (why, *wrong), tuple(applied))
    wrong += problems([*applied, *wanted], applied=len(applied))
    steps = _checked(pipe, applied, wanted)
    result = Plan(tuple(steps), tuple(wrong), tuple(applied))
    if result.ok:
        return result
    return replace(result, suggestion=_suggestion(pipe, applied, steps))


def resolve(passes: Passes) -> tuple[list[Pass], list[str]]:
    """Turn names into passes; return the well-formed passes and what is wrong with the rest.

    Raises:
        PlanError: there is no such preset, a file cannot be read, or this is no list at all.
    """
    if passes is None:
        passes = "faithful"
    if isinstance(passes, str | Path):
        passes = _named(passes)
    if not isinstance(passes, Iterable):
        single = f"; did you mean passes=[{passes!r}]?" if malformed(passes) is None else ""
        raise PlanError(f"passes must be a list or a preset's name, not {passes!r}{single}")
    found: list[Pass] = []
    wrong: list[str] = []
    for entry in passes:
        try:
            candidate = plugins.make(entry) if isinstance(entry, str) else entry
        except PlanError as error:
            wrong.append(str(error))
            continue
        if (why := malformed(candidate)) is None:
            found.append(candidate)
        else:
            wrong.append(why)
    return found, wrong


def chosen(preset: str | None, names: str | None) -> list[Pass]:
    """Find the passes that two options ask for.

    Args:
        preset: the name of a preset, or a file that tune wrote. It goes before names, which may
            be a default; `faithful` if both are None.
        names: names of passes in order, separated by commas; or `none`.

    Raises:
        PlanError: there is no such preset, file or pass.
    """
    if preset is not None or names is None:
        return list(preset_or_file(preset or "faithful"))
    if names == "none":
        return []
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise PlanError(f"--passes {names!r} names no pass; write none for none")
    return [plugins.make(name) for name in wanted]


def preset_or_file(name: str | Path) -> tuple[Pass, ...]:
    """Return the passes of a preset, or of a file that `fluxfire tune` wrote.

    Args:
        name: the preset's name; or the file, told by its suffix, `.json`, or by being a path.

    Raises:
        PlanError: there is no such preset, or the file cannot be read.
    """
    if isinstance(name, Path) or name.endswith(recipes.SUFFIX):
        return recipes.read(Path(name))
    return presets.named(name)


def _named(name: str | Path) -> tuple[Pass, ...]:
    """Return the same; of a name that is a pass's, say so."""
    try:
        return preset_or_file(name)
    except PlanError as error:
        if name in plugins.own() or name in plugins.announced():
            raise PlanError(f"{error}; did you mean passes=[{name!r}]?") from None
        raise


def provided_traits(pass_: Pass) -> frozenset[str]:
    """Return the traits that hold once a pass is applied."""
    return frozenset(getattr(pass_, "provides", ()))


def _disturbed(pipe: Any) -> str | None:
    """Say what keeps fluxfire from working on this pipeline now, or None."""
    owner = conductor_of(pipe)
    if owner is not None:
        return owner.disturbed(pipe)
    if shared_conductor(pipe.transformer) is not None:
        return (
            "this pipeline's transformer is already optimized through another pipeline; "
            "restore that one first"
        )
    return None


def _checked(pipe: Any, applied: Sequence[Pass], wanted: Sequence[Pass]) -> list[Step]:
    """Run every pass's check, each knowing the whole list and what earlier passes leave."""
    data = tuple(map(configured, (*applied, *wanted)))
    traits = kontext.traits(pipe).union(*map(provided_traits, applied))
    steps = []
    for index, pass_ in enumerate(wanted):
        others = (*applied, *wanted[:index])
        twin = any(p.name == pass_.name for p in others)  # complained of already
        target = Target(pipe, environment(), data, traits)
        steps.append(Step(pass_, () if twin else _findings(pass_, target)))
        traits |= provided_traits(pass_)
    return steps


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


def _suggestion(
    pipe: Any, applied: Sequence[Pass], steps: Sequence[Step]
) -> tuple[Pass, ...] | None:
    """Find a list that would work on top of what is applied, by trying."""
    rest = workable([step.pass_ for step in steps], applied)
    replaced: set[str] = set()
    while rest:
        steps = _checked(pipe, applied, rest)
        refused = next((n for n, step in enumerate(steps) if step.refused), None)
        if refused is None:
            return tuple(rest)
        rest = workable(_mended(rest, refused, steps[refused].findings, replaced), applied)
    return None


def _mended(
    passes: Sequence[Pass], refused: int, findings: Iterable[Finding], replaced: set[str]
) -> list[Pass]:
    """Do as findings advise: put another pass there, once a name, or leave one out."""
    earlier, pass_, later = passes[:refused], passes[refused], passes[refused + 1 :]
    for finding in findings:
        other = finding.instead
        if finding.level != "error":
            continue
        if other is not None and malformed(other) is None and pass_.name not in replaced:
            replaced.add(pass_.name)
            return [*earlier, other, *later]
        without = [p for p in earlier if finding.trait not in provided_traits(p)]
        if len(without) < len(earlier):
            return [*without, pass_, *later]
    return [*earlier, *later]
