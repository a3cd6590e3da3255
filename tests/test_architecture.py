"""The package's parts import downwards only, as the map in docs/pages/explanation says."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter

import pytest

import draw_imports

PARTS = draw_imports.parts()
FILES = draw_imports.files()


@pytest.fixture(scope="module")
def between_files():
    return draw_imports.between_files()


def test_every_file_stands_in_a_part_of_the_map_and_every_part_is_there():
    assert [file for file in FILES if draw_imports.part_of(file, PARTS) is None] == []
    found = {draw_imports.part_of(file, PARTS) for file in FILES}
    assert sorted(PARTS) == sorted(found)


def test_imports_point_down_only(between_files):
    upwards = [
        f"{file} imports {other}"
        for (file, other) in between_files
        for above, below in [[PARTS.index(draw_imports.part_of(f, PARTS)) for f in (file, other)]]
        if above > below
    ]
    assert upwards == []


def test_no_file_imports_itself_by_way_of_others(between_files):
    sorter = TopologicalSorter()
    for file, other in between_files:
        sorter.add(file, other)
    sorter.prepare()  # raises CycleError, which names the circle


def test_a_pass_knows_no_sister(between_files):
    inside = [arrow for arrow in between_files if all(f.startswith("passes/") for f in arrow)]
    known = {(file, other) for file, other in inside if not other.startswith("passes/shared/")}
    assert {file for file, _ in known} == {"passes/__init__.py"}


def test_only_the_architecture_names_classes_of_flux():
    """So that another architecture is another folder beside `kontext/`."""
    naming = {
        file
        for file in FILES
        for node in ast.walk(ast.parse((draw_imports.PACKAGE / file).read_text()))
        for name in (
            getattr(node, "id", None),
            getattr(node, "name", None),
            getattr(node, "attr", None),
        )
        if isinstance(name, str) and re.match(r"Flux[A-Z]", name)
    }
    assert {file.split("/")[0] for file in naming} <= {"kontext", "kernels", "spark"}


def test_every_way_to_import_is_followed(tmp_path, monkeypatch):
    for name, text in {
        "__init__.py": "__version__ = '1'",
        "a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pkg.b import B",
        "b.py": "import os\nimport pkg.c.d\nfrom pkg import __version__",
        "c/__init__.py": "def f():\n    from pkg import a\n    class C:\n        from pkg import g",
        "c/d.py": "from pkg.c import f",
    }.items():
        (tmp_path / "pkg" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pkg" / name).write_text(text)
    monkeypatch.setattr(draw_imports, "PACKAGE", tmp_path / "pkg")
    assert draw_imports.between_files() == {
        ("a.py", "b.py"): {"for annotations"},
        ("b.py", "c/d.py"): {"at once"},
        ("c/__init__.py", "a.py"): {"when used"},
        ("c/__init__.py", "__init__.py"): {"when used"},
        ("c/d.py", "c/__init__.py"): {"at once"},
    }


def test_the_drawing_is_that_of_the_code(between_files):
    arrows = draw_imports.between_parts(between_files, PARTS)
    same = draw_imports.DRAWING.read_text() == draw_imports.draw(PARTS, arrows)
    assert same, "draw it anew: python docs/draw_imports.py"
