"""What is in the built distributions: `python contents.py FOLDER`. Needs nothing but Python."""

from __future__ import annotations

import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

ROOT = Path(__file__).parents[2]
DATA = {
    "fluxfire/py.typed",
    "fluxfire/bench/page.html.jinja",
    "fluxfire/bench/schema.json",
    "fluxfire/serve/page/app.js",
    "fluxfire/serve/page/index.html",
    "fluxfire/serve/page/examples.json",
    "fluxfire/serve/page/style.css",
    *(
        f"fluxfire/serve/page/{name}-{part}.webp"
        for name in ("boat", "castle", "sea", "snow")
        for part in ("before", "after")
    ),
    "fluxfire/spark/spark.safetensors",
    "fluxfire/spark/things.png",
}


def check_wheel(path: Path) -> None:
    """The package with its data, the licence and the metadata, and nothing else."""
    modules = {p.relative_to(ROOT / "src").as_posix() for p in (ROOT / "src").rglob("*.py")}
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        info = next(name for name in names if name.endswith("/METADATA")).removesuffix("METADATA")
        metadata = wheel.read(info + "METADATA")
        entry_points = wheel.read(info + "entry_points.txt").decode()
        weights = wheel.getinfo("fluxfire/spark/spark.safetensors").file_size
    packaged = {name for name in names if not name.startswith(info)}
    assert packaged == modules | DATA, packaged ^ (modules | DATA)
    assert f"{info}licenses/LICENSE" in names
    assert "fluxfire = fluxfire.cli:main" in entry_points
    assert weights == (ROOT / "src/fluxfire/spark/spark.safetensors").stat().st_size
    check_metadata(metadata)


def check_metadata(raw: bytes) -> None:
    """What an index shows of the package; the text is the README, whole."""
    metadata = message_from_bytes(raw)
    assert metadata["Name"] == "fluxfire"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Description-Content-Type"] == "text/markdown"
    text = metadata.get_payload(decode=True).decode().strip()
    assert text == (ROOT / "README.md").read_text(encoding="utf-8").strip()


def check_sdist(path: Path) -> None:
    """All that is needed to build, test and document it again."""
    with tarfile.open(path) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames()}
    wanted = {f"src/{name}" for name in DATA} | {
        ".ci/constraints.txt",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "LICENSE",
        "PKG-INFO",
        "README.md",
        "benchmarks/figures.py",
        "benchmarks/spark_training/__main__.py",
        "docs/mkdocs.yml",
        "examples/modal_app.py",
        "examples/new_pass/pyproject.toml",
        "noxfile.py",
        "pyproject.toml",
        "tests/conftest.py",
    }
    assert wanted <= names, wanted - names
    strays = {name for name in names if "__pycache__" in name or name.startswith((".nox", "dist"))}
    assert not strays, strays


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    [wheel] = folder.glob("*.whl")
    [sdist] = folder.glob("*.tar.gz")
    check_wheel(wheel)
    check_sdist(sdist)
