"""Everything that is done to this repository, one session each: `nox -l` lists them.

`nox` runs what a contributor wants to know before sending a change, in less than ten minutes.
`nox -s everything-else` runs all that it leaves out; the two share no test. `.ci/run` runs both.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nox

# venv and pip, since uv does not look at pip's local files, where torch may lie.
nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lint", "typing", "quick", "docs"]
nox.options.reuse_existing_virtualenvs = True

CONSTRAINTS = Path(".ci/constraints.txt")
TORCH = next(line for line in CONSTRAINTS.read_text().split() if line.startswith("torch=="))
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PYPROJECT = nox.project.load_toml("pyproject.toml")
TESTED = "[cli,bench,serve,s3,otel]"
EXTRAS = tuple(PYPROJECT["project"]["optional-dependencies"])
DIST = Path("dist")
CHECKS = Path("tests/distribution")
USER_CODE = "tests/typed/user_code.py"
# The oldest versions that pyproject.toml admits.
MINIMUMS = (
    "diffusers==0.35.0",
    "transformers==4.56.0",
    "safetensors==0.6.2",
    "peft==0.17.0",
    "filelock==3.13.0",
    "numpy==1.26.0",
    "pillow==11.0.0",
    "tokenizers==0.22.0",
    "tqdm==4.66.0",
)
# What `newest` lifts every upper bound of.
NEWEST = ("accelerate", "diffusers", "peft", "safetensors", "tokenizers", "transformers")
# Where another diffusers or transformers shows: how pipelines are built, called and patched.
UPSTREAM = (
    "tests/passes/test_attention.py",
    "tests/passes/test_encoding_cache.py",
    "tests/passes/test_fused_blocks.py",
    "tests/passes/test_qkv_fusion.py",
    "tests/test_api.py",
    "tests/test_blocks.py",
    "tests/test_generation.py",
    "tests/test_loading.py",
    "tests/test_private_names.py",
)
# Where an old diffusers shows besides: what a cache reads from a generation.
CACHES = ("tests/passes/test_first_block_cache.py", "tests/passes/test_reference_cache.py")
# Files of tests that `quick` leaves to `rest`: nearly all take over half a minute on one core.
LONG = (
    "tests/spark",
    "tests/passes/test_para_attention.py",
    "tests/test_bench.py",
    "tests/test_cli_bench.py",
    "tests/test_conformance.py",
    "tests/test_copies.py",
    "tests/test_freshness.py",
    "tests/test_interrupts.py",
    "tests/test_later.py",
    "tests/test_memory.py",
    "tests/test_modes.py",
    "tests/test_serve_http.py",
    "tests/test_serve_page.py",
    "tests/test_suggestions.py",
    "tests/test_tune.py",
    "tests/test_undo.py",
)


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


def environment_above(session: nox.Session, name: str) -> tuple[str, Path]:
    """Make a virtual environment that has all of the session's packages, and room for its own.

    Returns:
        Its Python, and where its own packages go.
    """
    folder = Path(session.create_tmp(), name).resolve()
    session.run("python", "-m", "venv", "--clear", str(folder))
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    below = session.run("python", "-c", where, silent=True)
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "below.pth").write_text(str(below))
    return str(folder / "bin" / "python"), packages


def run_tests(session: nox.Session, *arguments: str) -> None:
    """Run pytest on two processes of one thread each, unless told otherwise."""
    asked = ("-n", "2", "--dist", "loadfile", *arguments, *session.posargs)
    session.run("pytest", *asked, env={"OMP_NUM_THREADS": "1"})


def run_benchmark(session: nox.Session, *asked: str) -> None:
    """Run `benchmarks/edits.py` in small, unless options say otherwise."""
    out = Path(session.create_tmp(), "edits.json").resolve()
    arguments = asked or ("--stacks", "eager", "QKVFusion alone", "--rounds", "1")
    session.run("python", "benchmarks/edits.py", "--tiny", "--out", str(out), *arguments)


@nox.session(requires=["lint"])
def quick(session: nox.Session) -> None:
    """Lint, then run the quick tests: no slow ones, no long files. Less than four minutes."""
    install(session, "test", "oracles", extras=TESTED)
    run_tests(session, "-m", "not slow", *(f"--ignore={path}" for path in LONG))


@nox.session
def rest(session: nox.Session) -> None:
    """Run the tests that `quick` leaves out, the documentation's code blocks, and a benchmark."""
    install(session, "test", "oracles", "docs", extras=TESTED)
    run_tests(session, *LONG)
    run_tests(session, "-m", "slow", *(f"--ignore={path}" for path in LONG))
    run_benchmark(session)


@nox.session(name="everything-else", requires=["rest", "minimums", "package"])
def everything_else(session: nox.Session) -> None:
    """Run all that plain `nox` leaves out."""
    session.log("with plain `nox`, that is everything")


@nox.session(default=False)
def tests(session: nox.Session) -> None:
    """Run what you name: `nox -s tests -- tests/test_api.py -k restore`; else the whole suite."""
    install(session, "test", "oracles", "docs", extras=TESTED)
    run_tests(session)


@nox.session
def minimums(session: nox.Session) -> None:
    """Run the tests that diffusers and transformers matter to on the oldest versions supported.

    None that compiles. `nox -s minimums -- tests/passes` runs what you name, as CI does every week
    with all tests of passes.
    """
    install(session, "test", extras="[cli]")
    session.install("-c", str(CONSTRAINTS), *MINIMUMS)
    run_tests(session, "-m", "not slow", *(() if session.posargs else (*UPSTREAM, *CACHES)))


@nox.session(default=False)
def newest(session: nox.Session) -> None:
    """Run the tests that diffusers and transformers matter to on the newest versions of both.

    Upper bounds in `.ci/constraints.txt` do not hold here: so this tells whether one can go. CI
    runs it every week, not for each change: no change of ours makes it fail.
    """
    install_torch(session)
    tools = nox.project.dependency_groups(PYPROJECT, "test")
    session.install(TORCH, "--upgrade", "-e", ".[cli]", *tools, *NEWEST)
    run_tests(session, "-m", "not slow", *UPSTREAM)


@nox.session
def build(session: nox.Session) -> None:
    """Build the wheel and the source distribution into dist/, and check what is in them."""
    session.install("build", "twine")
    shutil.rmtree(DIST, ignore_errors=True)
    session.run("pyproject-build", "--outdir", str(DIST), silent=True)
    session.run("twine", "check", "--strict", *map(str, DIST.iterdir()))
    session.run("python", str(CHECKS / "contents.py"), str(DIST))


@nox.session(reuse_venv=False, requires=["build"])
def package(session: nox.Session) -> None:
    """Use the wheel as users do: without extras, then with each extra alone."""
    install_torch(session)
    session.install("-c", str(CONSTRAINTS), str(next(DIST.glob("*.whl"))))
    session.run("python", "-I", str(CHECKS / "without_extras.py"))
    for extra in EXTRAS:
        session.log(f"with the extra {extra}")
        python, packages = environment_above(session, extra)
        # As the errors advise; it must find in the wheel's metadata what to add, and no torch.
        asked = ("-c", str(CONSTRAINTS), f"fluxfire[{extra}]")
        session.run(python, "-m", "pip", "install", "--quiet", *asked, external=True)
        if again := [p.name for p in packages.glob("*") if p.name in {"torch", "fluxfire"}]:
            session.error(f"the extra {extra} installs {' and '.join(again)} again")
        session.run(python, "-I", str(CHECKS / "with_extra.py"), extra, external=True)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting, and that every package imported is declared."""
    session.install(*nox.project.dependency_groups(PYPROJECT, "lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("deptry", "src", silent=True)  # it prints a line for each package that it guesses


@nox.session
def typing(session: nox.Session) -> None:
    """Check types, strictly."""
    install(session, "typing", extras="[serve]")
    session.install("nox")
    session.run("mypy")
    # As a user checks code against the installed package, settings of ours aside.
    session.run("mypy", "--config-file=", "--strict", "--cache-dir=.mypy_cache/user", USER_CODE)


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


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Run the benchmark of whole edits on the tiny pipeline; `rest` does so, too."""
    install(session)
    run_benchmark(session, *session.posargs)


@nox.session
def demo(session: nox.Session) -> None:
    """Edit held-out scenes with Spark, plain and with passes, and compare."""
    install(session, extras="[cli]")
    session.run("fluxfire", "demo", *session.posargs, env=dict(os.environ))
