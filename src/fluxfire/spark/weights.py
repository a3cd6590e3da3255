"""Saves and loads Spark's weights: one float16 safetensors file in the package."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from fluxfire.errors import LoadError
from fluxfire.spark import language

SHIPPED = Path(__file__).parent / "spark.safetensors"


def save(
    parts: dict[str, Any],
    path: Path,
    *,
    values: Mapping[nn.Parameter, torch.Tensor] | None = None,
    **facts: str,
) -> None:
    """Write every component's weights as float16.

    Args:
        parts: components by name, from `fluxfire.spark.model.parts`.
        path: the file.
        values: values to write in place of some parameters' own.
        facts: additional metadata of the file.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, module in parts.items():
        if isinstance(module, nn.Module):
            for key, tensor in own_state(module).items():
                value = (values or {}).get(tensor, tensor)  # type: ignore[call-overload]
                tensors[_file_key(name, key)] = value.detach().to("cpu", torch.float16).contiguous()
    metadata = {"words": _vocabulary_hash(), **facts}
    if "vae" in parts:
        vae = parts["vae"].config
        scale = {"scaling_factor": vae.scaling_factor, "shift_factor": vae.shift_factor}
        metadata["vae"] = json.dumps(scale)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")  # so that a crash does not damage the old file
    save_file(tensors, partial, metadata=metadata)
    partial.replace(path)


def restore(parts: dict[str, Any], path: Path) -> dict[str, str]:
    """Load weights into components, in place, and return the file's metadata.

    Raises:
        LoadError: the file is missing, or it does not fit these components or this version's
            vocabulary.
    """
    if not path.is_file():
        raise LoadError(
            f"there are no trained weights at {path}; in a checkout of fluxfire, train them (on a "
            f"GPU, an hour and a half) with PYTHONPATH=benchmarks python -m spark_training --out "
            f"runs/spark, and put spark.safetensors there"
        )
    with safe_open(path, framework="pt") as file:
        facts: dict[str, str] = file.metadata()
        if facts["words"] != _vocabulary_hash():
            raise LoadError(f"{path} was trained on another vocabulary than this version's")
        for name, module in parts.items():
            if isinstance(module, nn.Module):
                keys = own_state(module)
                try:
                    state = {key: file.get_tensor(_file_key(name, key)) for key in keys}
                    module.load_state_dict(state, strict=len(keys) == len(module.state_dict()))
                except Exception as error:
                    raise LoadError(f"{path} does not fit Spark's {name}: {error}") from error
    if "vae" in parts:
        parts["vae"].register_to_config(**json.loads(facts["vae"]))
    return facts


def own_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the module's state; a tensor with two names appears only under the first."""
    seen: dict[int, str] = {}
    return {
        key: tensor
        for key, tensor in module.state_dict(keep_vars=True).items()
        if seen.setdefault(id(tensor), key) == key
    }


def _file_key(component: str, key: str) -> str:
    """Return a tensor's name in the file, which has no `text_model.`: transformers 5 dropped it."""
    return f"{component}.{key.removeprefix('text_model.')}"


def _vocabulary_hash() -> str:
    return hashlib.sha256(" ".join(language.words()).encode()).hexdigest()[:16]
