"""Versions and device facts, read once."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fluxfire._version import __version__


@dataclass(frozen=True)
class Environment:
    """Where the code runs.

    Attributes:
        python: version of Python.
        packages: version by package; None for one that is not installed.
        cuda: CUDA version torch was built with, or None.
        gpu: name of the first CUDA device, or None without one.
        capability: its compute capability, as (major, minor).
        gpu_bytes: its memory, in bytes.
    """

    python: str
    packages: dict[str, str | None]
    cuda: str | None
    gpu: str | None
    capability: tuple[int, int] | None
    gpu_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)


_PACKAGES = (
    "fluxfire", "torch", "triton", "diffusers", "transformers",
    "safetensors", "accelerate", "peft", "torchao",
)  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def environment() -> Environment:
    """Read the environment; the first call imports torch."""
    import torch

    packages = {name: _version(name) for name in _PACKAGES}
    packages |= {"torch": torch.__version__, "fluxfire": __version__}  # torch: with +cpu or +cu130
    if not torch.cuda.is_available():
        return Environment(
            platform.python_version(), packages, torch.version.cuda, None, None, None
        )
    device = torch.cuda.get_device_properties(0)
    return Environment(
        platform.python_version(),
        packages,
        torch.version.cuda,
        device.name,
        (device.major, device.minor),
        device.total_memory,
    )
