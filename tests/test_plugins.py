from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

import fluxfire
from doubles import SkipBlock
from fluxfire import plugins
from fluxfire.cli import main
from fluxfire.errors import PlanError


@pytest.fixture
def announced(monkeypatch):
    entries = [
        EntryPoint("skip-block", "doubles:SkipBlock", plugins.GROUP),
        EntryPoint("gone", "no_such_package:Gone", plugins.GROUP),
    ]
    monkeypatch.setattr(plugins, "entry_points", lambda group: entries)


def test_an_announced_pass_is_found_by_name(pipe, announced):
    fluxfire.optimize(pipe, ["skip-block"])
    assert fluxfire.report(pipe).passes[0].configuration == repr(SkipBlock())


def test_a_plugin_that_cannot_be_imported_says_so(pipe, announced):
    with pytest.raises(PlanError, match="'gone' is announced as no_such_package:Gone, which"):
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
    monkeypatch.setattr(plugins, "announced", lambda: entries)
    with pytest.raises(PlanError, match=r"cannot be imported: RuntimeError: no driver"):
        fluxfire.optimize(pipe, ["broken"])
    with pytest.raises(PlanError, match=r"'needy' cannot be used by its name alone .*'path'"):
        fluxfire.optimize(pipe, ["needy"])


def test_unknown_names_list_plugins_too(pipe, announced):
    with pytest.raises(PlanError, match="fused-blocks, gone, inductor-patch"):
        fluxfire.optimize(pipe, ["cache"])


def test_doctor_looks_at_plugins_too(capsys, announced):
    assert main(["doctor", "--model", "random-tiny"]) == 0
    said = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "applies" in said["skip-block"]
    assert "does not apply" in said["gone"]
    assert "cannot be imported" in said["gone"]
