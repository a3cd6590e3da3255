"""The installed package where none of its extras is: `python -I without_extras.py`."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE = "fluxfire"
OF_EXTRAS = {
    "fastapi",
    "httpx",
    "multipart",
    "prometheus_client",
    "pydantic",
    "pydantic_settings",
    "starlette",
    "uvicorn",
}
OF_TORCH = {"triton"}  # which comes with torch for CUDA


def fluxfire(*arguments: str, status: int = 0) -> str:
    """Run the command in a folder of its own, and return what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, ".env").write_text("HF_TOKEN=hf_of_nobody\n")
        env = {key: value for key, value in os.environ.items() if key != "HF_TOKEN"}
        done = subprocess.run(
            [sys.executable, "-I", "-m", PACKAGE, *arguments],
            capture_output=True, text=True, check=False, cwd=folder, env=env,
        )  # fmt: skip
    assert done.returncode == status, (arguments, done.returncode, done.stdout, done.stderr)
    return done.stdout + done.stderr


def check_import_is_light() -> None:
    """`import fluxfire` loads neither torch nor diffusers."""
    heavy = "{'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)"
    code = f"import json, sys, fluxfire; print(json.dumps(sorted({heavy})))"
    out = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, check=True).stdout
    assert json.loads(out) == []


def check_modules() -> None:
    """Each module can be imported, but for those of the service that need its extras."""
    package = importlib.import_module(PACKAGE)
    assert "site-packages" in package.__file__, package.__file__
    for module in pkgutil.walk_packages(package.__path__, f"{PACKAGE}."):
        if module.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            absent = OF_EXTRAS if module.name.startswith(f"{PACKAGE}.serve.") else OF_TORCH
            assert error.name in absent, (module.name, error.name)


def check_commands() -> None:
    """What only looks works."""
    assert "first-block-cache" in fluxfire("passes")
    help_ = fluxfire("--help")
    assert all(command in help_ for command in ("doctor", "run", "bench", "tune", "serve"))
    assert re.search(r"^memory-layout +applies", fluxfire("doctor"), re.MULTILINE)


def check_what_is_missing_is_told() -> None:
    """In one line, which says what to install."""
    for extra, arguments in {
        "serve": ["serve"],
        "bench": ["bench", "--plots", "plots"],
        "cli": ["plan", "--passes", "inductor-patch", "--model", "somebody/kontext"],
    }.items():
        said = fluxfire(*arguments, status=1)
        assert said.startswith("error: "), said
        assert said.count("\n") == 1, said
        assert f'pip install "fluxfire[{extra}]"' in said, said
    plan = fluxfire("plan", "--passes", "para-attention", status=1)
    assert 'para-attn is not installed; pip install "fluxfire[para-attn]"' in plan, plan
    from fluxfire.serve.storage import StorageError
    from fluxfire.serve.stores import open_storage

    try:
        open_storage("s3://b", secret=b"", retention_seconds=9, link_seconds=9)
    except StorageError as error:
        assert 'pip install "fluxfire[s3]"' in str(error), error
    else:
        raise AssertionError("boto3 is there")


if __name__ == "__main__":
    check_import_is_light()
    check_commands()
    check_what_is_missing_is_told()
    check_modules()
