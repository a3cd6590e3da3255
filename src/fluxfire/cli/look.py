"""The commands that only look: `passes`, `plan` and `doctor`."""

from __future__ import annotations

import argparse

from fluxfire.cli.options import (
    Commands,
    add_command,
    add_model,
    add_passes,
    load_model,
    note_option,
    say,
    wanted,
)
from fluxfire.errors import FluxfireError
from fluxfire.text import table


def add(commands: Commands) -> None:
    """Add `passes`, `plan` and `doctor`.

    Args:
        commands: the commands there are already.
    """
    add_command(
        commands, "passes", passes, "list the passes, fluxfire's own and installed plugins'"
    )

    parser = add_command(commands, "plan", plan, "say what optimizing would do, and change nothing")
    add_model(parser)
    add_passes(parser)

    parser = add_command(
        commands, "doctor", doctor, "print versions, the GPU, and which passes apply"
    )
    add_model(parser)


def passes(_: argparse.Namespace) -> int:
    """List the passes.

    Returns:
        The exit status.
    """
    from fluxfire.planning import registry

    rows = [_described(name) for name in registry.own()]
    rows += [_described(n, f" (plugin: {e.value})") for n, e in registry.announced().items()]
    say(table(("pass", "stage", "slot", "exactness", "what it does"), rows))
    return 0


def _described(name: str, origin: str = "") -> tuple[str, ...]:
    """Describe a pass in a row; of one that cannot be used, say why."""
    from fluxfire.planning import registry
    from fluxfire.planning.rules import malformed

    try:
        made = registry.make(name)
    except FluxfireError as error:
        return (name, "-", "-", "-", str(error))
    if (why := malformed(made)) is not None:
        return (name, "-", "-", "-", why)
    story = (type(made).__doc__ or "").strip().partition("\n")[0]
    return (name, made.stage, made.slot or "-", made.exactness, story + origin)


def plan(arguments: argparse.Namespace) -> int:
    """Say what optimizing would do.

    Args:
        arguments: the command's.

    Returns:
        The exit status: 1 if the passes cannot be applied.
    """
    from fluxfire import api

    asked = wanted(arguments)
    planned = api.plan(load_model(arguments.model), asked)
    say(planned)
    note_option(planned.suggestion or ())
    return 0 if planned.ok else 1


def _waiting(policy: str | None) -> str:
    """Say how threads wait in the user's own scripts, where the command's setting is not."""
    if policy is not None and policy.lower() == "passive":
        return policy
    return f"{policy or 'not set'}; export passive, or scripts of your own may be 10 times slower"


def doctor(arguments: argparse.Namespace) -> int:
    """Print versions, the GPU, and which passes apply.

    Args:
        arguments: the command's.

    Returns:
        The exit status.
    """
    from fluxfire import api
    from fluxfire.environment import environment
    from fluxfire.planning import registry

    env = environment()
    rows = [("python", env.python)]
    rows += [(name, version or "not installed") for name, version in env.packages.items()]
    rows += [("CUDA", env.cuda or "none"), ("GPU", env.gpu or "none")]
    if env.gpu is None:
        rows.append(("OMP_WAIT_POLICY", _waiting(arguments.wait_policy)))
    say(table(("what", "found"), rows))
    say()
    pipe = load_model(arguments.model)
    verdicts = []
    for name in (*registry.own(), *registry.announced()):
        planned = api.plan(pipe, [name])
        findings = [str(f) for step in planned.steps for f in step.findings]
        verdict = "applies" if planned.ok else "does not apply"
        verdicts.append((name, verdict, "; ".join([*planned.problems, *findings])))
    say(table(("pass", f"on {arguments.model}", "why"), verdicts))
    return 0
