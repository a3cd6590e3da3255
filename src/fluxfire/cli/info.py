"""The commands that print facts and change nothing: `passes`, `plan` and `doctor`."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from fluxfire.cli import catalog
from fluxfire.cli.console import note_suggestion, say, say_json
from fluxfire.cli.options import (
    Commands,
    add_check,
    add_command,
    add_json,
    add_memory,
    add_model,
    add_passes,
    load_model,
    needs_placing,
    selected_passes,
)
from fluxfire.errors import FluxfireError
from fluxfire.protocol import Finding, Pass
from fluxfire.text import spell, table

if TYPE_CHECKING:  # so that the command line answers before torch is loaded
    from fluxfire.planning.plan import Plan


def add(commands: Commands) -> None:
    """Add `passes`, `plan` and `doctor`."""
    parser = add_command(
        commands, "passes", list_passes, "list fluxfire's passes and those of installed plugins",
        example="fluxfire passes first-block-cache",
    )  # fmt: skip
    option = parser.add_argument(
        "name", nargs="?", metavar="NAME",
        help="print all that this pass says about itself, and its settings",
    )  # fmt: skip
    option.completer = lambda **_: catalog.pass_names()  # type: ignore[attr-defined]
    add_check(parser, _check_name)
    add_json(parser)

    parser = add_command(
        commands, "plan", print_plan, "dry run: show what optimizing would change",
        example="fluxfire plan --passes qkv-fusion,compile",
    )  # fmt: skip
    add_model(parser)
    add_passes(parser)
    add_memory(parser)
    add_json(parser)

    parser = add_command(
        commands, "doctor", diagnose, "show versions, the GPU, and which passes apply here",
        example="fluxfire doctor --model ./kontext",
    )  # fmt: skip
    add_model(parser)
    add_json(parser)


def list_passes(arguments: argparse.Namespace) -> int:
    """List the passes, or describe one; only plugins are imported."""
    facts = [asdict(f) | {"plugin": None, "error": None} for f in catalog.own_passes().values()]
    facts += _plugins()
    if arguments.name is not None:
        (one,) = (f for f in facts if f["name"] == arguments.name)
        return _describe(one, as_json=arguments.json)
    if arguments.json:
        say_json(facts)
        return 0
    rows = [
        (
            f["name"],
            f["stage"] or "-",
            f["slot"] or "-",
            " or ".join(f["exactness"]) or "-",
            f["error"] or f["summary"] + (f" (plugin: {f['plugin']})" if f["plugin"] else ""),
        )
        for f in facts
    ]
    say(table(("pass", "stage", "slot", "exactness", "what it does"), rows))
    return 0


def _check_name(arguments: argparse.Namespace) -> None:
    if arguments.name is not None:
        arguments.name = catalog.check_pass_name(arguments.name)


def _describe(facts: dict[str, Any], *, as_json: bool) -> int:
    """Print a pass's facts, docstring and settings; 1 means that its plugin cannot be used."""
    text = catalog.own_texts().get(facts["name"])
    if text is None and facts["error"] is None:
        text = _text_of_plugin(facts["name"])
    if as_json:
        say_json(facts | asdict(text or catalog.PassText("", ())))
    elif text is None:
        say(f"{facts['name']} (plugin: {facts['plugin']}): {facts['error']}")
    else:
        slot = f", slot {facts['slot']}" if facts["slot"] else ""
        say(f"{facts['class_name']} ({facts['name']}): stage {facts['stage']}{slot}, "
            f"{' or '.join(facts['exactness'])}\n")  # fmt: skip
        say(text.docstring)
        say("\nSettings:" if text.settings else "\nIt has no settings.")
        for setting in text.settings:
            say(f"    {setting}")
    return 0 if text else 1


def _text_of_plugin(name: str) -> catalog.PassText:
    """Read a plugin's class, which its entry point names."""
    from fluxfire.planning import registry

    made: Any = registry.make(name)
    own = fields(made) if is_dataclass(made) else ()
    settings = (f"{field.name} = {getattr(made, field.name)!r}" for field in own if field.init)
    return catalog.PassText(inspect.getdoc(type(made)) or "", tuple(settings))


def _plugins() -> Iterator[dict[str, Any]]:
    """Describe the passes of plugins; say why one cannot be used."""
    from fluxfire.planning import registry
    from fluxfire.planning.rules import why_not_a_pass

    for name, entry in registry.third_party().items():
        try:
            made = registry.make(name)
            error = why_not_a_pass(made)
        except FluxfireError as failure:
            error = str(failure)
        facts = catalog.PassFacts(name, "", "", None, (), "")
        if error is None:
            cls = type(made)
            summary = (cls.__doc__ or "").strip().partition("\n")[0]
            facts = catalog.PassFacts(
                name, cls.__name__, made.stage, made.slot, (made.exactness,), summary
            )
        yield asdict(facts) | {"plugin": entry.value, "error": error}


def print_plan(arguments: argparse.Namespace) -> int:
    """Print the plan; 1 means that the passes cannot be applied."""
    passes = selected_passes(arguments, dry_run=True)
    from fluxfire import api

    pipe = load_model(arguments.model, placed=needs_placing(arguments, passes))
    plan = api.plan(pipe, passes, memory=arguments.memory)
    if arguments.json:
        say_json(_plan_as_data(plan))
    else:
        say(plan)
        note_suggestion(plan.suggestion or ())
    return 0 if plan.ok else 1


def _plan_as_data(plan: Plan) -> dict[str, Any]:
    suggestion = plan.suggestion
    return {
        "ok": plan.ok,
        "passes": [
            {
                **_pass_as_data(step.pass_),
                "findings": [_finding_as_data(f) for f in step.findings],
                "problems": list(step.faults),
            }
            for step in plan.steps
        ],
        "problems": list(plan.problems),
        "suggestion": None if suggestion is None else [_pass_as_data(p) for p in suggestion],
        "left_out": list(plan.left_out),
    }


def _pass_as_data(pass_: Pass) -> dict[str, str]:
    return {
        "name": pass_.name,
        "configuration": spell(pass_),
        "stage": pass_.stage,
        "exactness": pass_.exactness,
    }


def _finding_as_data(finding: Finding) -> dict[str, str]:
    return {"level": finding.level, "message": finding.message, "remedy": finding.remedy}


def diagnose(arguments: argparse.Namespace) -> int:
    """Print versions, the GPU, and which passes apply to the model."""
    from fluxfire import api
    from fluxfire.environment import environment
    from fluxfire.planning import registry
    from fluxfire.reporting.private_names import missing

    env = environment()
    pipe = load_model(arguments.model)
    plans = {
        name: api.plan(pipe, [name]) for name in (*registry.built_in(), *registry.third_party())
    }
    if arguments.json:
        say_json({
            "environment": env.to_dict(),
            "missing_names": missing(),
            "omp_wait_policy": arguments.wait_policy,
            "model": arguments.model,
            "passes": {name: _plan_as_data(plan) for name, plan in plans.items()},
        })  # fmt: skip
        return 0
    rows = [("python", env.python)]
    rows += [(name, version or "not installed") for name, version in env.packages.items()]
    rows += [("CUDA", env.cuda or "none"), ("GPU", env.gpu or "none")]
    if env.gpu is not None:
        rows.append(("Kontext in bfloat16", _room_for_kontext()))
    if env.gpu is None:
        rows.append(("OMP_WAIT_POLICY", _judge_wait_policy(arguments.wait_policy)))
    if lacking := missing():
        said = f"{', '.join(lacking)}; fluxfire may fail with these versions"
        rows.append(("missing names", said))
    say(table(("what", "found"), rows))
    say()
    verdicts = [
        (
            name,
            "applies" if plan.ok else "does not apply",
            "; ".join([*plan.problems, *(str(f) for step in plan.steps for f in step.findings)]),
        )
        for name, plan in plans.items()
    ]
    say(table(("pass", f"on {arguments.model}", "why"), verdicts))
    return 0


def _room_for_kontext() -> str:
    """Say how FLUX.1 Kontext fits into the GPU's memory."""
    from fluxfire import modules
    from fluxfire.kontext.random_weights import full_kontext
    from fluxfire.passes.contrib.placement import default_device
    from fluxfire.planning.memory import advise

    pipe: Any = full_kontext(device="meta")
    return advise(pipe, modules.usable_bytes(default_device()))


def _judge_wait_policy(policy: str | None) -> str:
    """Say how threads wait in the user's own scripts; here the command sets it to passive."""
    if policy is not None and policy.lower() == "passive":
        return policy
    return (
        f"{policy or 'not set'}; set it to passive in your shell, or your own scripts may be ten "
        f"times slower"
    )
