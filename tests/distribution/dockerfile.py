"""Follows the Dockerfile of `examples/deploy` without Docker: `python dockerfile.py`.

It makes a virtual environment in a folder, which stands for the image. It copies and installs what
the Dockerfile does, with its very commands, and starts the service with the Dockerfile's variables
and command. It asks the service as the Dockerfile's health check does, makes an edit, and stops it.
Where it is root, the service runs as another user, as in the container, if that user can read this
Python.

It leaves out what a folder cannot be: the base image, apt-get and useradd.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[2]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
NOBODY = 65534
PORT = 8765
PATIENCE = 900
LEFT_OUT = ("apt-get", "useradd")


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, each with the rest of its line."""
    text = (ROOT / "examples" / "deploy" / "Dockerfile").read_text()
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [tuple(line.split(" ", 1)) for line in lines if line.strip()]


class Image:
    """The folder that stands for the image."""

    def __init__(self, folder: Path, torch_index: str) -> None:
        self.folder, self.here = folder, folder
        self.variables = {"TORCH_INDEX": torch_index}
        self.command: list[str] = []
        self.check: list[str] = []
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        for place in ("data", "run/secrets"):
            (folder / place).mkdir(parents=True)
        folder.chmod(0o755)

    def inside(self, text: str) -> str:
        """Let absolute paths be in the folder."""
        return re.sub(r"(?<![\w/.])/(data|build|run/secrets)\b", rf"{self.folder}/\1", text)

    def environment(self) -> dict[str, str]:
        """The variables of a process in the image."""
        path = f"{self.folder}/venv/bin:{os.environ['PATH']}"
        outside = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "FLUXFIRE"))}
        return {**outside, **self.variables, "PATH": path, "HOME": str(self.folder / "data")}

    def follow(self, name: str, rest: str) -> None:
        """Do what an instruction says."""
        if name == "COPY":
            *sources, target = rest.split()
            for source in sources:
                self.copy(ROOT / source, self.here / target, whole=len(sources) == 1)
        elif name == "WORKDIR":
            self.here = Path(self.inside(rest))
            self.here.mkdir(exist_ok=True)
        elif name == "ENV":
            for pair in shlex.split(rest):
                key, _, value = pair.partition("=")
                self.variables[key] = self.inside(value)
        elif name == "RUN" and not any(word in rest for word in LEFT_OUT):
            sys.stdout.write(f"RUN {rest}\n")
            sys.stdout.flush()
            shell = ["/bin/sh", "-ec", self.inside(rest)]
            subprocess.run(shell, cwd=self.here, env=self.environment(), check=True)
        elif name == "CMD":
            self.command = json.loads(rest)
        elif name == "HEALTHCHECK":
            self.check = json.loads(rest.partition(" CMD ")[2])

    @staticmethod
    def copy(source: Path, target: Path, *, whole: bool) -> None:
        """Copy as COPY does: a folder's content, or a file into a folder."""
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target if whole else target / source.name)


def try_service(image: Image) -> None:
    """Start the service with a key, edit, and stop it."""
    fluxfire = str(image.folder / "venv" / "bin" / "fluxfire")
    made = subprocess.run(
        [fluxfire, "serve", "--new-key", "ann"], capture_output=True, text=True, check=True
    )
    (image.folder / "run" / "secrets" / "fluxfire_keys").write_text(made.stdout)
    (key,) = re.findall(r"ff_\S+", made.stderr)
    environment = {**image.environment(), "FLUXFIRE_PORT": str(PORT)}
    user = other_user(fluxfire)
    if user is not None:
        shutil.chown(image.folder / "data", user)
    server = subprocess.Popen(image.command, cwd=image.here, env=environment, user=user)
    check = [part.replace(":8000/", f":{PORT}/") for part in image.check]
    try:
        until(lambda: done(check, environment), server, "the health check passes")
        assert status("/about", {}) == 401
        until(lambda: status("/ready", {}) == 200, server, "the service is ready")
        body = json.dumps({"prompt": "a red circle", "steps": 1}).encode()
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        answer = json.loads(ask("/inference", headers, body))
        link = answer["images"][0]["url"]
        assert ask(link, {}).startswith(base64.b64decode("iVBORw0KGgo=")), link
        data = image.folder / "data"
        assert (data / "jobs.sqlite").exists()
        assert len(list((data / "pictures").iterdir())) == 1
        server.send_signal(signal.SIGTERM)
        server.wait(65)
    finally:
        server.kill()
    assert server.returncode in {0, -signal.SIGTERM}, server.returncode


def other_user(program: str) -> int | None:
    """Who runs the service instead of root; None if nobody else can run the program."""
    if os.getuid() != 0:
        return None
    try:
        subprocess.run([program, "--version"], user=NOBODY, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.stdout.write(f"as root, since another user cannot start this Python: {error}\n")
        return None
    return NOBODY


def ask(path: str, headers: dict[str, str], body: bytes | None = None) -> bytes:
    """Ask the service."""
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", body, headers)
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        return answer.read()


def status(path: str, headers: dict[str, str]) -> int:
    """The status of an answer; 0 where nobody answers."""
    try:
        ask(path, headers)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0
    return 200


def done(command: list[str], environment: dict[str, str]) -> bool:
    """Whether a command succeeds."""
    return (
        subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0
    )


def until(condition, server: subprocess.Popen, what: str) -> None:
    """Wait for something, while the server runs."""
    ends = time.monotonic() + PATIENCE
    while not condition():
        assert server.poll() is None, f"the service ended before {what}"
        assert time.monotonic() < ends, f"{what}: not within {PATIENCE} s"
        time.sleep(0.5)


def main() -> None:
    """Follow all of it in a temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-index", default=CPU_INDEX, help="the build argument TORCH_INDEX")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fluxfire-image-") as folder:
        image = Image(Path(folder), arguments.torch_index)
        for name, rest in instructions():
            image.follow(name, rest)
        assert image.command, "the Dockerfile has no CMD"
        assert image.check, "the Dockerfile has no HEALTHCHECK"
        try_service(image)
    sys.stdout.write("the Dockerfile's steps work\n")


if __name__ == "__main__":
    main()
