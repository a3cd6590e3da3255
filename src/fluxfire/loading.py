"""Loads pipelines: from the package, a folder or the Hugging Face hub, or with random weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

from fluxfire import spark
from fluxfire.diffusers_types import DiffusersPipeline
from fluxfire.errors import LoadError
from fluxfire.kontext.random_weights import full_kontext, tiny_kontext
from fluxfire.model_names import RANDOM, SPARK, model_folder
from fluxfire.supported import refusal
from fluxfire.text import extra_hint

# Names of exception classes of httpx, requests and huggingface_hub. Their base classes differ from
# version to version, so isinstance would not do.
_UNREACHABLE = {
    "ConnectError",
    "ConnectionError",
    "LocalEntryNotFoundError",
    "OfflineModeIsEnabled",
}
_KNOWS_DTYPE = (0, 40)
"""The first diffusers whose pipelines take `dtype`; since then `torch_dtype` warns."""
RANDOM_MODELS = dict(zip(RANDOM, (tiny_kontext, full_kontext), strict=True))


def load(
    model: str, *, device: str | None = None, dtype: torch.dtype | None = None
) -> DiffusersPipeline:
    """Load a Kontext pipeline.

    Args:
        model: a folder that `save_pretrained` wrote; or a hub id such as
            `black-forest-labs/FLUX.1-Kontext-dev`; or `spark`, the small trained Kontext that ships
            with fluxfire; or `random-tiny` or `random-full`, a Kontext with random weights.
        device: by default `"cuda"` if there is a CUDA device, else `"cpu"`.
        dtype: by default bfloat16 on CUDA, else float32.

    Raises:
        LoadError: the pipeline cannot be loaded. The message says why, and what to do.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    if model == SPARK:
        return spark.load(device=device, dtype=dtype)
    if model in RANDOM_MODELS:
        return RANDOM_MODELS[model](device=device, dtype=dtype)
    folder = model_folder(model)
    token = None if folder else hub_token()
    from diffusers import DiffusionPipeline

    precision = {_dtype_argument(): dtype}
    try:
        pipe = DiffusionPipeline.from_pretrained(folder or model, token=token, **precision)
    except Exception as error:
        raise LoadError(_explain(model, error)) from error
    if (why := refusal(pipe)) is not None:
        raise LoadError(f"{model} is not a Kontext pipeline: {why}")
    return pipe.to(device)


def hub_token(folder: Path | None = None) -> str | None:
    """Return HF_TOKEN, the user's Hugging Face token, from the environment or from a .env file.

    Args:
        folder: the folder with the file `.env`; by default the current folder.

    Returns:
        The token; None if neither has it.

    Raises:
        LoadError: there is a file `.env`, but it cannot be read, or python-dotenv is not installed.
    """
    if token := os.environ.get("HF_TOKEN"):
        return token
    file = (folder or Path.cwd()) / ".env"
    if not file.is_file():
        return None
    try:
        from dotenv import dotenv_values
    except ImportError as error:
        raise LoadError(
            f"{file} exists, but python-dotenv is not installed: {extra_hint('cli')}, "
            f"or set HF_TOKEN in the environment"
        ) from error
    try:
        token = dotenv_values(file).get("HF_TOKEN")
    except (OSError, ValueError) as error:
        raise LoadError(f"{file} cannot be read: {error}") from error
    return str(token) if token else None


def _dtype_argument() -> str:
    """Return what the installed diffusers calls the dtype; the other name is ignored or warns."""
    major, minor, *_ = metadata.version("diffusers").split(".")
    return "dtype" if (int(major), int(minor)) >= _KNOWS_DTYPE else "torch_dtype"


def _explain(model: str, error: BaseException) -> str:
    """Return one sentence that says why loading failed, and what to do."""
    statuses = {_status(e) for e in _chain(error)}
    if statuses & {401, 403}:
        return (
            f"the hub refused {model}: if it is gated, accept the licence on "
            f"https://huggingface.co/{model}, then set HF_TOKEN (environment or .env) to a "
            f"token of that account"
        )
    if 404 in statuses:  # noqa: PLR2004 - HTTP's own number
        return f"the hub has no model {model}; check the id's spelling"
    if _UNREACHABLE & {type(e).__name__ for e in _chain(error)}:
        return (
            f"{model} is not on this machine, and the hub cannot be reached (a gated model also "
            f"needs its licence accepted and HF_TOKEN set)"
        )
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"{model} could not be loaded: {first}"


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
