"""The list of private names has every private name of other packages that the source uses."""

from __future__ import annotations

import ast
import inspect
import json
import pkgutil
import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

import fluxfire
from fluxfire.cli import main
from fluxfire.reporting import private_names
from fluxfire.reporting.private_names import PRIVATE_NAMES, PrivateName

PACKAGE = Path(fluxfire.__file__).parent
PYTHONS_OWN = {
    "_current_frames",
    "_exit",
    "_getframe",
    "_replace",
}  # documented, in spite of the underscore
NO_NAMES = {"_hub"}  # strings: the end of the names of diffusers' kernels from the hub
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def is_private(dotted):
    return any(re.match(r"_[A-Za-z]", part) for part in dotted.split("."))


class Definitions(ast.NodeVisitor):
    """Collects the private names that a file defines, attributes of `self` among them.

    A protocol defines none: it describes what objects of others have.
    """

    def __init__(self, tree):
        self.names = set()
        self.visit(tree)

    def visit_ClassDef(self, node):
        self.names.add(node.name)
        if not any("Protocol" in ast.unparse(base) for base in node.bases):
            self.generic_visit(node)

    def visit_FunctionDef(self, node):
        self.names.add(node.name)
        self.generic_visit(node)

    def visit_AsyncFunctionDef(self, node):
        self.visit_FunctionDef(node)

    def visit_Name(self, node):
        if isinstance(node.ctx, ast.Store):
            self.names.add(node.id)

    def visit_Attribute(self, node):
        of_self = isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"}
        if of_self and isinstance(node.ctx, ast.Store):
            self.names.add(node.attr)
        self.generic_visit(node)


class Uses(ast.NodeVisitor):
    """Collects the private names of others that a file uses, as (line, name).

    A name is dotted where the source tells what it belongs to: `from torch._dynamo import config`
    and `config.patch` are `torch._dynamo.config` and `torch._dynamo.config.patch`.
    """

    def __init__(self, tree, own, own_of_all):
        self.own, self.own_of_all = own, own_of_all
        self.imported = {}  # what a name stands for here
        self.found = []
        self.visit(tree)

    def note(self, node, name):
        if is_private(name) and name.split(".")[0] != "fluxfire":
            self.found.append((node.lineno, name))

    def visit_FunctionDef(self, node):
        outside, self.imported = self.imported, dict(self.imported)
        self.generic_visit(node)
        self.imported = outside

    def visit_AsyncFunctionDef(self, node):
        self.visit_FunctionDef(node)

    def visit_Import(self, node):
        for alias in node.names:
            self.note(node, alias.name)
            first = alias.name.split(".")[0]
            self.imported[alias.asname or first] = alias.name if alias.asname else first

    def visit_ImportFrom(self, node):
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            self.note(node, whole)
            self.imported[alias.asname or alias.name] = whole

    def visit_ClassDef(self, node):
        """Note private names that a class overrides."""
        bases = [resolved(self.whole(base)) for base in node.bases]
        for name in Definitions(ast.Module(node.body, [])).names:
            if re.match(r"_[A-Za-z]", name) and any(hasattr(base, name) for base in bases):
                self.note(node, name)
        self.generic_visit(node)

    def visit_Attribute(self, node):
        whole = self.whole(node)
        if whole is not None:
            self.note(node, whole)
            return
        receiver = node.value.id if isinstance(node.value, ast.Name) else ""
        own = self.own_of_all if receiver in {"self", "cls"} else self.own
        of_super = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "super"
        if of_super or node.attr not in own | PYTHONS_OWN:
            self.note(node, node.attr)
        self.visit(node.value)

    def visit_keyword(self, node):
        self.note(node.value, node.arg or "")
        self.generic_visit(node)

    def visit_Constant(self, node):
        """Take every string that could be a name, as it may be handed to `getattr` elsewhere."""
        text = node.value
        if not isinstance(text, str) or not DOTTED.fullmatch(text):
            return
        if "." in text and text.split(".")[0] not in LIBRARIES:
            return
        if not text.startswith("_fluxfire") and text not in self.own | NO_NAMES:
            self.note(node, text)

    def whole(self, node):
        """Return the dotted name of an attribute of something imported, or None."""
        if isinstance(node, ast.Name):
            return self.imported.get(node.id)
        if isinstance(node, ast.Attribute):
            of = self.whole(node.value)
            python = node.attr in PYTHONS_OWN and of in {"os", "sys"}
            return None if of is None or python else f"{of}.{node.attr}"
        return None


LIBRARIES = {entry.library for entry in PRIVATE_NAMES}


def resolved(dotted):
    if dotted is None or dotted.startswith("fluxfire"):
        return None
    try:
        return pkgutil.resolve_name(dotted)
    except (ImportError, AttributeError):
        return None


def uses(sources):
    """Return every use of a private name of others in some sources: (file, line, name)."""
    trees = {file: ast.parse(text) for file, text in sources.items()}
    own = {file: Definitions(tree).names for file, tree in trees.items()}
    own_of_all = set().union(*own.values())
    return [
        (file, line, name)
        for file, tree in trees.items()
        for line, name in Uses(tree, own[file], own_of_all).found
    ]


def is_use_of(name, entry):
    """Whether a name in the source is that of an entry; if dotted, the whole of it."""
    return name == (entry.dotted if "." in name else entry.name)


def covers(entry, name):
    """Whether an entry lists a name.

    It also lists the modules that it is in, and what a listed object has, if that is public.
    """
    if is_use_of(name, entry) or entry.dotted.startswith(f"{name}."):
        return True
    owner, _, last = name.rpartition(".")
    of_object = owner == entry.dotted and not inspect.ismodule(resolved(owner))
    return of_object and not is_private(last)


def not_listed(found, entries):
    return [
        f"{file}:{line}: {name}"
        for file, line, name in found
        if not any(covers(entry, name) for entry in entries)
    ]


@pytest.fixture(scope="module")
def found():
    files = [p for p in sorted(PACKAGE.rglob("*.py")) if p != Path(private_names.__file__)]
    return uses({f"src/fluxfire/{p.relative_to(PACKAGE)}": p.read_text() for p in files})


def test_every_private_name_in_the_source_is_listed(found):
    missing = not_listed(found, PRIVATE_NAMES)
    assert not missing, "add to src/fluxfire/reporting/private_names.py:\n" + "\n".join(missing)


@pytest.mark.parametrize("entry", PRIVATE_NAMES, ids=lambda entry: entry.dotted)
def test_the_installed_version_has_it(entry):
    if find_spec(entry.library) is None:
        pytest.skip(f"{entry.library} is not installed")
    assert entry.is_there(), f"{entry.dotted} is gone. {entry.use} Instead: {entry.instead}"


def test_no_entry_is_unused(found):
    names = {name for _, _, name in found}
    unused = [e.dotted for e in PRIVATE_NAMES if not any(is_use_of(name, e) for name in names)]
    assert not unused, "remove from src/fluxfire/reporting/private_names.py: " + ", ".join(unused)


def test_no_name_is_listed_twice():
    counts = Counter(entry.dotted for entry in PRIVATE_NAMES)
    assert [name for name, count in counts.items() if count > 1] == []


def test_a_name_that_is_gone_is_missing(monkeypatch):
    gone = [
        PrivateName("torch", "_gone", "", ""),
        PrivateName("torch._gone", "name", "", ""),
        PrivateName("torch.nn.Module.forward_gone", "_name", "", ""),
        PrivateName("diffusers.FluxKontextPipeline.__call__", "_gone", "", ""),
        PrivateName("diffusers.ModelMixin", "_gone", "", "", since=(0, 1)),
    ]
    fine = [
        PrivateName("diffusers.ModelMixin", "_not_yet", "", "", since=(999, 0)),
        PrivateName("not_loaded", "_name", "", ""),
    ]
    pytest.importorskip("diffusers")
    monkeypatch.setattr(private_names, "PRIVATE_NAMES", (*gone, *fine))
    assert private_names.missing() == [entry.dotted for entry in gone]


def test_doctor_shows_what_is_missing(monkeypatch, capsys):
    gone = PrivateName("torch", "_gone", "", "")
    monkeypatch.setattr(private_names, "PRIVATE_NAMES", (*PRIVATE_NAMES, gone))
    assert main(["doctor", "--model", "random-tiny"]) == 0
    assert "torch._gone; fluxfire may fail with these versions" in capsys.readouterr().out
    assert main(["doctor", "--model", "random-tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["missing_names"] == ["torch._gone"]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import torch\ntorch._new(1)", "torch._new"),
        ("import torch._new", "torch._new"),
        ("from torch import _new", "torch._new"),
        ("from torch._new import public", "torch._new.public"),
        ("def f():\n from torch import _new as n\n n.public", "torch._new.public"),
        ("x.y[0]._new", "_new"),
        ("def f(x):\n return getattr(x, '_new')", "_new"),
        ("vars(x)['_new']", "_new"),
        ("NAMES = ('_new',)", "_new"),
        ("'torch._new.config' in modules", "torch._new.config"),
        ("pipe(_new=True)", "_new"),
        ("class A(Protocol):\n _new: int\ndef f(x: A): x._new", "_new"),
        ("class A:\n def _new(self):\n  super()._new()", "_new"),
        ("from torch import nn\nclass A(nn.Module):\n def _get_name(self): pass", "_get_name"),
    ],
)
def test_the_scan_sees_every_way_to_use_a_name(source, name):
    assert name in {found for _, _, found in uses({"a.py": source})}


@pytest.mark.parametrize(
    "source",
    [
        "class A:\n def __init__(self):\n  self._own = 1\n def get(self): return self._own",
        "def _own(): pass\nimport this_file\nx._own",
        "from fluxfire._version import __version__",
        "x.__dict__, vars(x)['__class__'], '_', '_fluxfire_mark', 'a.b', 'not _a_name'",
        "import os, sys\nos._exit(1), sys._getframe(1), pair._replace(a=1)",
    ],
)
def test_the_scan_leaves_our_own_names_out(source):
    assert uses({"a.py": source}) == []


def test_an_own_name_of_another_file_is_ours_on_self_alone():
    base = "class A:\n def __init__(self):\n  self._own = 1"
    assert uses({"a.py": base, "b.py": "self._own"}) == []
    assert uses({"a.py": base, "b.py": "other._own"}) == [("b.py", 1, "_own")]
