"""What is chosen where the service is deployed, and what of it every container has to know."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fluxfire.errors import FluxfireError

EXTRAS = ("serve", "s3", "cli")
CEILINGS = {"torch": "<2.14", "diffusers": "<1", "transformers": "<6"}
"""What an image stays below, where fluxfire itself only says what it needs at least."""
SECRET = "fluxfire"  # noqa: S105 - its name
KEYS = "FLUXFIRE_KEYS"


class DeploymentError(FluxfireError):
    """The service cannot be deployed, or not be started, as it is asked for."""


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """What can be chosen, each by the environment variable `FLUXFIRE_` and its name in capitals.

    Attributes:
        model: what `fluxfire.loading.load` takes.
        preset: a preset's name, or a file that `fluxfire tune` wrote. None is the server's own
            default: `faithful`, unless a request asks for a lossy quality.
        storage: where pictures are stored, as the server's own option; None sends them back.
        max_queue: requests that wait in one container.
        max_batch: requests that are edited together.
        max_containers: how many there are at most, each with a GPU of its own.
        scaledown_seconds: without a request, after which a container is switched off.
        gpu_snapshot: whether the worker is part of the memory snapshot (1 or 0).
    """

    model: str = "black-forest-labs/FLUX.1-Kontext-dev"
    preset: str | None = None
    storage: str | None = None
    max_queue: int = 32
    max_batch: int = 1
    max_containers: int = 4
    scaledown_seconds: int = 60
    gpu_snapshot: bool = False

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Deployment:
        """Read what was chosen.

        Args:
            environ: environment variables; one that is missing or empty means the default.

        Raises:
            DeploymentError: a number is none, or is below 1.
        """
        given = {f.name: environ.get(_variable(f.name), "") for f in fields(cls)}
        return cls(**{name: _parsed(name, text) for name, text in given.items() if text})

    def variables(self) -> dict[str, str]:
        """Write what was chosen as environment variables, which `read` reads back."""
        told = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            _variable(name): str(int(value) if isinstance(value, bool) else value)
            for name, value in told.items()
            if value is not None
        }


def settings_arguments(
    chosen: Deployment, keys_file: Path, passes: Path | None = None
) -> dict[str, Any]:
    """Return the keyword arguments of the server's `Settings`.

    Args:
        chosen: what was chosen.
        keys_file: hashed API keys; on the open internet there is no service without.
        passes: a file that `warm` saved, to be used instead of the preset by name.
    """
    return {
        "model": chosen.model,
        "preset": chosen.preset if passes is None else str(passes),
        "keys_file": keys_file,
        "storage": chosen.storage,
        "max_queue": chosen.max_queue,
        "max_batch": chosen.max_batch,
    }


def write_keys(environ: Mapping[str, str], file: Path) -> Path:
    """Put the hashed keys, which come as a secret, where the server reads them.

    Args:
        environ: environment variables.
        file: what to write; only its owner can read it.

    Returns:
        The file.

    Raises:
        DeploymentError: there are no keys.
    """
    keys = environ.get(KEYS, "").strip()
    if not keys:
        raise DeploymentError(
            f"the secret {SECRET!r} has no {KEYS}, and the service is not started without keys; "
            f"set {KEYS} to what the file of hashed keys holds"
        )
    file.unlink(missing_ok=True)
    file.touch(mode=0o600)
    file.write_text(keys + "\n", encoding="utf-8")
    return file


def requirements(needed: Iterable[str]) -> tuple[str, ...]:
    """Select what a container installs of what fluxfire's own metadata says that it needs.

    Args:
        needed: requirements, with markers.

    Returns:
        Requirements without markers, capped by `CEILINGS`, sorted.
    """
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    found = set()
    for one in map(Requirement, needed):
        if one.marker and not any(one.marker.evaluate({"extra": extra}) for extra in EXTRAS):
            continue
        one.specifier &= SpecifierSet(CEILINGS.get(one.name, ""))
        one.marker = None
        found.add(str(one))
    return tuple(sorted(found))


def _variable(name: str) -> str:
    return f"FLUXFIRE_{name.upper()}"


def _parsed(name: str, text: str) -> Any:
    default = getattr(Deployment, name)
    if not isinstance(default, int):
        return text
    least = 0 if isinstance(default, bool) else 1
    if not text.isdecimal() or int(text) < least:
        raise DeploymentError(f"{_variable(name)}={text!r}; it must be a number, {least} or more")
    return type(default)(int(text))
