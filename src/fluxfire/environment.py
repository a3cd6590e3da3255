"""Reads versions of packages, and facts about the GPU."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fluxfire._version import __version__


@dataclass(frozen=True)
class Environment:
    """Versions and GPU of this process.

    Attributes:
        python: version of Python.
        packages: the version of each package; None for a package that is not installed.
        cuda: the CUDA version that torch was built with; None without CUDA.
        gpu: name of the first CUDA device; None without a device.
        capability: compute capability of this device, as (major, minor); None without a device.
        gpu_bytes: memory of this device in bytes; None without a device.
    """

    python: str
    packages: dict[str, str | None]
    cuda: str | None
    gpu: str | None
    capability: tuple[int, int] | None
    gpu_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return the environment as plain data."""
        return asdict(self)


_PACKAGES = (
    "fluxfire",
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "safetensors",
    "accelerate",
    "peft",
    "torchao",
)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def environment() -> Environment:
    """Read the environment, once for each process. The first call imports torch."""
    import torch

    packages = {name: _version(name) for name in _PACKAGES}
    # torch.__version__ has a suffix such as +cpu or +cu130, which the package's metadata may lack.
    packages |= {"torch": torch.__version__, "fluxfire": __version__}
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
