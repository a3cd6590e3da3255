"""The names of passes and presets, without importing them: that would import torch.

The facts about fluxfire's own passes are read from their source. Plugins are known by their entry
points.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from fluxfire.cli.console import UsageError
from fluxfire.protocol import EXACTNESS
from fluxfire.text import did_you_mean

NO_PASSES = "none"


@dataclass(frozen=True)
class PassFacts:
    """The facts that a pass's class states.

    Attributes:
        name: its name on the command line.
        class_name: its name in Python.
        stage: its stage.
        slot: the slot it fills, or None.
        exactness: its exactness; two values if it depends on the settings.
        summary: the first line of its docstring.
    """

    name: str
    class_name: str
    stage: str
    slot: str | None
    exactness: tuple[str, ...]
    summary: str


@dataclass(frozen=True)
class PassText:
    """What a pass's class says about itself at length.

    Attributes:
        docstring: its docstring.
        settings: each setting as the source has it, such as `threshold: float = 0.12`.
    """

    docstring: str
    settings: tuple[str, ...]


@cache
def own_passes() -> dict[str, PassFacts]:
    """Return fluxfire's own passes by name."""
    found = [_read_pass(node) for node in _own_classes()]
    return {facts.name: facts for facts in found}


@cache
def own_texts() -> dict[str, PassText]:
    """Return what fluxfire's own passes say about themselves, by name."""
    return {
        _read_pass(node).name: PassText(ast.get_docstring(node) or "", tuple(_settings(node)))
        for node in _own_classes()
    }


@cache
def presets() -> tuple[str, ...]:
    """Return the names of the presets."""
    for node in _parse("fluxfire.presets").body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PresetName":
            return tuple(ast.literal_eval(node.value.slice))  # type: ignore[attr-defined]
    raise LookupError("fluxfire.presets has no PresetName")


def pass_names() -> list[str]:
    """Return the names of all passes, plugins' included, sorted."""
    from fluxfire.planning import registry

    return sorted({*own_passes(), *registry.third_party()})


def check_passes(text: str) -> None:
    """Check the value of `--passes`: names, separated by commas.

    Raises:
        UsageError: a name is unknown, or there is none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError(f"--passes {text!r} names no pass; write {NO_PASSES} for none")
    if unknown := [name for name in names if name not in {*own_passes(), *_class_names()}]:
        if names == [NO_PASSES]:
            return
        if preset := next((name for name in unknown if name in presets()), None):
            raise UsageError(f"{preset!r} is a preset, not a pass; write --preset {preset}")
        known = pass_names()
        if wrong := [name for name in unknown if name not in known]:
            raise UsageError("; ".join(_explain_unknown(name, known) for name in wrong))


def check_pass_name(text: str) -> str:
    """Return the name of the pass that a user names, by its name or its class name.

    Raises:
        UsageError: there is no such pass.
    """
    by_class = {facts.class_name: facts.name for facts in own_passes().values()}
    name = by_class.get(text, text)
    if name not in own_passes() and name not in (known := pass_names()):
        raise UsageError(_explain_unknown(name, known))
    return name


def check_preset(text: str) -> None:
    """Check the value of `--preset`, if it is no file.

    Raises:
        UsageError: there is no such preset.
    """
    if text not in presets():
        names = [name.strip() for name in text.split(",")]
        hint = did_you_mean(text, presets())
        if {*names} <= {*own_passes(), *_class_names()}:
            hint = f"; did you mean --passes {text}?"
        raise UsageError(f"there is no preset {text!r}; there are {', '.join(presets())}{hint}")


def _class_names() -> list[str]:
    """Return the class names of fluxfire's own passes; `--passes` takes them, too."""
    return [facts.class_name for facts in own_passes().values()]


def _explain_unknown(name: str, known: list[str]) -> str:
    """Say that a pass is unknown, and which pass the user may mean."""
    hint = did_you_mean(name.replace("_", "-"), known) or f"; there are {', '.join(known)}"
    return f"there is no pass {name!r}{hint}"


def _parse(module: str) -> ast.Module:
    """Parse a module's source."""
    *packages, last = module.split(".")[1:]
    place = files("fluxfire").joinpath(*packages)
    file = place / f"{last}.py"
    if not file.is_file():
        file = place / last / "__init__.py"
    return ast.parse(file.read_text(encoding="utf-8"))


def _literals(body: list[ast.stmt]) -> Iterator[tuple[str, object]]:
    """Yield the names that get a literal value, with the value."""
    for node in body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None)
        for target in targets:
            if isinstance(target, ast.Name) and isinstance(value, ast.Constant | ast.Tuple):
                yield target.id, ast.literal_eval(value)


def _own_classes() -> Iterator[ast.ClassDef]:
    """Yield the classes of fluxfire's own passes, sorted by their names."""
    imports = [n for n in _parse("fluxfire.passes").body if isinstance(n, ast.ImportFrom)]
    classes = [(a.name, i.module) for i in imports for a in i.names if i.module != "__future__"]
    for name, module in sorted(classes):
        yield from (
            node
            for node in _parse(str(module)).body
            if isinstance(node, ast.ClassDef) and node.name == name and _is_pass(node)
        )


def _is_pass(node: ast.ClassDef) -> bool:
    """Whether a class has `apply`; `Schedule`, the value of a setting, has not."""
    return any(isinstance(n, ast.FunctionDef) and n.name == "apply" for n in node.body)


def _settings(node: ast.ClassDef) -> Iterator[str]:
    """Yield the fields of a pass's class."""
    for field in node.body:
        if isinstance(field, ast.AnnAssign):
            kind = ast.unparse(field.annotation)
            if not kind.startswith("ClassVar") and kind != "KW_ONLY":
                yield ast.unparse(field)


def _read_pass(node: ast.ClassDef) -> PassFacts:
    """Read a pass's facts from its class."""
    said = {name: value for name, value in _literals(node.body) if name in _MEMBERS}
    exactness = (str(said["exactness"]),) if "exactness" in said else _returned_exactness(node)
    summary = (ast.get_docstring(node) or "").partition("\n")[0]
    slot = said["slot"]
    return PassFacts(
        str(said["name"]), node.name, str(said["stage"]), None if slot is None else str(slot),
        exactness, summary,
    )  # fmt: skip


_MEMBERS = ("name", "stage", "slot", "exactness")


def _returned_exactness(node: ast.ClassDef) -> tuple[str, ...]:
    """Return what a pass's property `exactness` can return."""
    (method,) = (n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "exactness")
    words = {n.value for n in ast.walk(method) if isinstance(n, ast.Constant)}
    return tuple(word for word in EXACTNESS if word in words)
