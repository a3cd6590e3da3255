"""Everything that is done to this repository, one session each: `nox -l` lists them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nox

# venv and pip, since uv does not look at pip's local files, where torch may lie.
nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lint", "typing", "tests", "minimums", "docs", "bench"]
nox.options.reuse_existing_virtualenvs = True

CONSTRAINTS = Path(".ci/constraints.txt")
TORCH = next(line for line in CONSTRAINTS.read_text().split() if line.startswith("torch=="))
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PYPROJECT = nox.project.load_toml("pyproject.toml")
# The oldest versions that pyproject.toml admits.
MINIMUMS = ("diffusers==0.35.0", "transformers==4.56.0", "safetensors==0.6.2", "peft==0.17.0")


def install_torch(session: nox.Session) -> None:
    """Install torch alone and pinned, without gigabytes of CUDA where there is no GPU.

    A file that pip knows of locally is taken first; without an NVIDIA driver, torch comes
    from its own index of CPU builds.
    """
    pip = [str(Path(session.bin) / "python"), "-m", "pip", "install", "--quiet"]
    local = [*pip, "--no-index", "--no-deps", TORCH]
    if subprocess.run(local, capture_output=True, check=False).returncode == 0:  # noqa: S603
        return
    cpu_only = sys.platform == "linux" and shutil.which("nvidia-smi") is None
    session.install(TORCH, *(["--index-url", CPU_INDEX] if cpu_only else []))


def install(session: nox.Session, *groups: str, extras: str = "") -> None:
    """Install torch, then fluxfire as it lies here, then groups of development tools."""
    install_torch(session)
    tools = nox.project.dependency_groups(PYPROJECT, *groups) if groups else ()
    session.install("-c", str(CONSTRAINTS), "-e", f".{extras}", *tools)


def run_tests(session: nox.Session, *arguments: str) -> None:
    """Run pytest on two processes of one thread each, unless told otherwise."""
    session.run("pytest", "-n", "2", *arguments, *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
def tests(session: nox.Session) -> None:
    """Run the whole suite, the documentation's code blocks included."""
    install(session, "test", "oracles", extras="[cli,bench,serve,s3,modal]")
    run_tests(session)


@nox.session
def minimums(session: nox.Session) -> None:
    """Run what does not compile on the oldest diffusers and transformers supported."""
    install(session, "test", extras="[cli]")
    session.install("-c", str(CONSTRAINTS), *MINIMUMS)
    run_tests(session, "-m", "not slow")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    session.install(*nox.project.dependency_groups(PYPROJECT, "lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def typing(session: nox.Session) -> None:
    """Check types, strictly."""
    install(session, "typing", extras="[serve]")
    session.install("nox")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation; a warning is an error."""
    session.install(*nox.project.dependency_groups(PYPROJECT, "docs"))
    session.run("mkdocs", "build", "--strict", "--quiet", "-f", "docs/mkdocs.yml")


@nox.session
def figures(session: nox.Session) -> None:
    """Rewrite what the documentation says of committed results, and the drawing of the code."""
    install(session, extras="[serve]")
    session.run("python", "benchmarks/figures.py")
    session.run("python", "docs/draw_imports.py")


@nox.session
def bench(session: nox.Session) -> None:
    """Run the benchmark of whole edits on the tiny pipeline."""
    install(session)
    out = Path(session.create_tmp(), "edits.json").resolve()
    arguments = session.posargs or ["--stacks", "eager", "QKVFusion alone", "--rounds", "1"]
    session.run("python", "benchmarks/edits.py", "--tiny", "--out", str(out), *arguments)


@nox.session
def demo(session: nox.Session) -> None:
    """Edit held-out scenes with Spark, plain and with passes, and compare."""
    install(session, extras="[cli]")
    session.run("fluxfire", "demo", *session.posargs, env=dict(os.environ))
