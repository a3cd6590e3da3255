"""Loads pipelines: from the package, a folder or the Hugging Face hub, or with random weights.

Importing this module loads no torch, so that the command line refuses a wrong name at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from fluxfire.diffusers_types import DiffusersPipeline
from fluxfire.errors import LoadError
from fluxfire.text import extra_hint

if TYPE_CHECKING:  # so that this file loads no torch
    import torch

SPARK = "spark"
"""Name of the small trained Kontext that ships with fluxfire."""
RANDOM = ("random-tiny", "random-full")
"""Names of Kontext models with random weights."""
KONTEXT = "black-forest-labs/FLUX.1-Kontext-dev"
"""The real model's hub id."""

# Names of exception classes of httpx, requests and huggingface_hub. Their base classes differ from
# version to version, so isinstance would not do.
_UNREACHABLE = {
    "ConnectError",
    "ConnectionError",
    "LocalEntryNotFoundError",
    "OfflineModeIsEnabled",
}
_SINGLE_FILES = (".safetensors", ".gguf", ".sft", ".ckpt", ".bin")
_KNOWS_DTYPE = (0, 40)
"""The first diffusers whose pipelines take `dtype`; since then `torch_dtype` warns."""


def load(
    model: str, *, device: str | None = None, dtype: torch.dtype | None = None
) -> DiffusersPipeline:
    """Load a plain Kontext pipeline onto a device; see `fluxfire.load`."""
    import torch

    from fluxfire import spark
    from fluxfire.kontext.random_weights import full_kontext, tiny_kontext
    from fluxfire.supported import refusal

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or default_dtype(device)
    if model == SPARK:
        return spark.load(device=device, dtype=dtype)
    if model in RANDOM:
        make = tiny_kontext if model == RANDOM[0] else full_kontext
        return make(device=device, dtype=dtype)
    folder = model_folder(model)
    token = None if folder else hub_token()
    from diffusers import DiffusionPipeline

    from fluxfire.kontext import checkpoint

    precision = {_dtype_argument(): dtype}
    parts = {}
    if folder is not None and checkpoint.is_int8(folder):
        parts = checkpoint.read(folder, dtype)
    try:
        pipe = DiffusionPipeline.from_pretrained(folder or model, token=token, **parts, **precision)
    except Exception as error:
        raise LoadError(_explain(model, error)) from error
    if (why := refusal(pipe)) is not None:
        raise LoadError(f"{model} is not a Kontext pipeline: {why}")
    return pipe.to(device)


def quantize(
    model: str,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    progress: Callable[[str, int, int], object] | None = None,
) -> int:
    """Write an int8 checkpoint, which `fluxfire.load` reads: half the size of bfloat16.

    The linear layers of the transformer's blocks and of T5 are in int8 with one scale for each
    output channel, as `Int8` and `Int8TextEncoder` make them. At most 2 GiB are in memory at
    once. diffusers cannot read the folder. A pipeline loaded from it has no other weights:
    `restore` brings back the int8 ones.

    Args:
        model: a folder that `save_pretrained` wrote, or a hub id.
        folder: the new folder; it must not exist.
        dtype: dtype of all other tensors, by default bfloat16.
        device: where to quantize; by default `"cuda"` if there is a CUDA device, else `"cpu"`.
        progress: called with a part's name, the bytes read of it so far, and its bytes in all.

    Returns:
        The size of the new folder in bytes.

    Raises:
        LoadError: the model cannot be read, or the folder exists.
    """
    import torch
    from diffusers import DiffusionPipeline

    from fluxfire.kontext import checkpoint

    if model == SPARK or model in RANDOM:
        raise LoadError(f"{model} is no checkpoint; name a folder or a hub id")
    source = model_folder(model)
    if source is None:
        try:
            source = Path(DiffusionPipeline.download(model, token=hub_token()))
        except Exception as error:
            raise LoadError(_explain(model, error)) from error
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return checkpoint.quantize(
        source,
        Path(folder).expanduser(),
        dtype=dtype or torch.bfloat16,
        device=where,
        progress=progress,
    )


def default_dtype(device: str) -> torch.dtype:
    """Return bfloat16 for a CUDA device, else float32."""
    import torch

    return torch.bfloat16 if device.startswith("cuda") else torch.float32


def model_folder(model: str) -> Path | None:
    """Return the folder that a name means; None for a model of fluxfire or a hub id.

    Raises:
        LoadError: the name means none of these. This does not use the network.
    """
    if model == SPARK or model in RANDOM:
        return None
    path = Path(model).expanduser()
    if path.exists() and path.suffix not in _SINGLE_FILES:
        if not (path / "model_index.json").is_file():
            raise LoadError(
                f"{model} holds no diffusers pipeline: it has no model_index.json "
                f"(pipe.save_pretrained writes one)"
            )
        return path
    if path.suffix in _SINGLE_FILES:
        raise LoadError(
            f"{model} is a single file, and fluxfire reads folders that pipe.save_pretrained "
            f"writes; load the file with FluxTransformer2DModel.from_single_file and give it to "
            f"FluxKontextPipeline.from_pretrained(…, transformer=…)"
        )
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise LoadError(
            f"there is no folder {model}, and it is no hub id (such as {KONTEXT}); fluxfire "
            f"brings {', '.join((SPARK, *RANDOM))}"
        )
    return None


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
