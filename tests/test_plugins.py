from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

import fluxfire
from doubles import SkipBlock
from fluxfire.cli import main
from fluxfire.errors import PlanError
from fluxfire.planning import registry


@pytest.fixture
def announced(monkeypatch):
    entries = [
        EntryPoint("skip-block", "doubles:SkipBlock", registry.GROUP),
        EntryPoint("gone", "no_such_package:Gone", registry.GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: entries)


def test_an_announced_pass_is_found_by_name(pipe, announced):
    fluxfire.optimize(pipe, ["skip-block"])
    assert fluxfire.report(pipe).passes[0].configuration == repr(SkipBlock())


def test_a_plugin_that_cannot_be_imported_says_so(pipe, announced):
    with pytest.raises(PlanError, match="'gone' is registered as no_such_package:Gone, which"):
        fluxfire.optimize(pipe, ["gone"])


def test_a_plugin_that_fails_otherwise_is_named_too(pipe, monkeypatch):
    class Needy:
        def __init__(self, path):
            self.path = path

    class Entry:
        value = "needy:Needy"

        def __init__(self, load):
            self.load = load

    def broken():
        raise RuntimeError("no driver")

    entries = {"needy": Entry(lambda: Needy), "broken": Entry(broken)}
    monkeypatch.setattr(registry, "third_party", lambda: entries)
    with pytest.raises(PlanError, match=r"cannot be imported: RuntimeError: no driver"):
        fluxfire.optimize(pipe, ["broken"])
    with pytest.raises(PlanError, match=r"'needy' cannot be used by its name alone .*'path'"):
        fluxfire.optimize(pipe, ["needy"])


def test_unknown_names_list_plugins_too(pipe, announced):
    with pytest.raises(PlanError, match="fused-blocks, gone, inductor-patch"):
        fluxfire.optimize(pipe, ["cache"])


def test_a_name_that_nobody_announces_gets_a_hint(pipe, announced):
    with pytest.raises(
        PlanError, match=r"pip install …\), and register .* group 'fluxfire.passes'$"
    ):
        fluxfire.optimize(pipe, ["zzz"])


def test_plugins_are_listed_as_what_they_are(capsys, announced):
    assert main(["passes"]) == 0
    said = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert said["skip-block"].split(maxsplit=4)[1:] == [
        "blocks", "-", "lossy", "Skips one block of the transformer. (plugin: doubles:SkipBlock)",
    ]  # fmt: skip
    assert "'gone' is registered as no_such_package:Gone, which cannot be" in said["gone"]


def test_a_plugin_that_is_no_pass_is_listed_so(capsys, monkeypatch):
    entries = [EntryPoint("odd", "decimal:Decimal", registry.GROUP)]
    monkeypatch.setattr(registry, "entry_points", lambda group: entries)
    assert main(["passes"]) == 0
    assert "is not a pass: it has no name, stage" in capsys.readouterr().out


def test_doctor_looks_at_plugins_too(capsys, announced):
    assert main(["doctor", "--model", "random-tiny"]) == 0
    said = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "applies" in said["skip-block"]
    assert "does not apply" in said["gone"]
    assert "cannot be imported" in said["gone"]
