"""What contributors are told is true: sessions, files and places exist, and the template works."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import tomllib
from pathlib import Path

import pytest

import test_conformance
import test_undo
from fluxfire import presets
from fluxfire.planning import registry
from fluxfire.testing import check_pass
from own_passes import ELSEWHERE, SETTINGS

ROOT = Path(__file__).parent.parent
CONTRIB = "fluxfire.passes.contrib"
TEMPLATE = ROOT / "examples" / "new_pass"
GUIDES = [
    *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md")),
    *sorted((ROOT / "docs" / "pages" / "contributing").rglob("*.md")),
    TEMPLATE / "README.md",
]
NOXFILE = ast.parse((ROOT / "noxfile.py").read_text())


def constant(name):
    """What the noxfile assigns to a name."""
    for node in NOXFILE.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise LookupError(name)


def sessions():
    """The sessions of the noxfile by name, each with what its decorator says."""
    found = {}
    for node in NOXFILE.body:
        for decorator in getattr(node, "decorator_list", ()):
            options = {k.arg: ast.literal_eval(k.value) for k in getattr(decorator, "keywords", ())}
            found[options.get("name", node.name)] = options
    return found


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(guide):
    links = re.findall(r"\]\(([^)\s#]+)[^)\s]*\)", guide.read_text())
    assert [x for x in links if "://" not in x and not (guide.parent / x).exists()] == []


def test_every_session_that_is_named_is_there():
    files = [ROOT / ".ci" / "run", *(ROOT / ".github").rglob("*.*"), *GUIDES]
    named = {s for f in files for s in re.findall(r"nox -s ([\w-]+)", f.read_text())}
    assert "quick" in named
    assert named <= set(sessions())


def test_what_contributors_and_ci_run_together_leaves_no_session_out():
    by_default = set(constant("nox.options.sessions"))
    else_ = set(sessions()["everything-else"]["requires"])
    by_hand = {
        "everything-else",
        "tests",
        "build",
        "figures",
        "demo",
        "newest",
        "bench",  # which `rest` runs, too
    }  # `package` requires `build`
    assert not by_default & else_
    assert by_default | else_ | by_hand == set(sessions())
    text = (ROOT / "docs" / "pages" / "contributing" / "index.md").read_text()
    told = re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE)
    assert sorted(told) == sorted(set(sessions()) - {"everything-else", "build"})


@pytest.mark.parametrize("name", ["LONG", "UPSTREAM"])
def test_the_files_that_sessions_name_are_there(name):
    assert [path for path in constant(name) if not (ROOT / path).exists()] == []


def test_ci_runs_the_command_of_the_readme():
    blocks = re.findall(r"```bash\n(.*?)\n```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [block for block in blocks if block in lines]


@pytest.mark.parametrize("tried", [test_conformance.OURS, test_undo.PASSES])
def test_every_pass_is_under_the_common_tests(tried):
    assert set(registry.built_in()) <= {pass_.name for pass_ in tried} | set(ELSEWHERE)


def test_the_tables_of_the_common_tests_name_passes_that_are_there():
    assert set(SETTINGS) | set(ELSEWHERE) <= set(registry.built_in())
    assert {pass_.name: name for name, own in SETTINGS.items() for pass_ in own} == {
        name: name for name in SETTINGS
    }
    classes = {name: registry.built_in()[name].__name__ for name in ELSEWHERE}
    texts = {name: (ROOT / file).read_text() for name, file in ELSEWHERE.items()}
    assert [name for name in ELSEWHERE if classes[name] not in texts[name]] == []


@pytest.mark.parametrize("cls", registry.built_in().values(), ids=lambda cls: cls.name)
def test_a_pass_has_a_file_of_tests(cls):
    assert (ROOT / "tests" / "passes" / f"test_{cls.__module__.split('.')[-1]}.py").is_file()


def test_passes_in_contrib_are_registered_unmeasured_and_in_no_preset():
    contributed = [
        cls for cls in registry.built_in().values() if cls.__module__.startswith(CONTRIB)
    ]
    folder = Path(importlib.import_module(CONTRIB).__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert {cls.__module__.split(".")[-1] for cls in contributed} == files
    assert [cls for cls in contributed if "Not measured yet." not in inspect.getdoc(cls)] == []
    listed = {type(pass_) for name in presets.NAMES for pass_ in presets.named(name)}
    assert not listed & set(contributed)


@pytest.fixture
def template(monkeypatch):
    monkeypatch.syspath_prepend(TEMPLATE / "src")
    return importlib.import_module("fluxfire_new_pass")


def test_the_template_announces_its_pass(template):
    project = tomllib.loads((TEMPLATE / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11"
    [(name, value)] = project["entry-points"][registry.GROUP].items()
    assert value == f"{template.__name__}:{template.NewPass.__name__}"
    assert name == template.NewPass.name


def test_the_templates_pass_keeps_its_promises(template):
    check_pass(template.NewPass())


def test_the_templates_tests_pass(template, monkeypatch):
    """But for `check_pass`, which takes long and has been called above."""
    monkeypatch.syspath_prepend(TEMPLATE / "tests")
    tests = importlib.import_module("test_new_pass")
    assert "check_pass(pass_)" in inspect.getsource(tests.test_it_keeps_its_promises)
    tests.test_a_block_that_is_not_there_is_refused()
