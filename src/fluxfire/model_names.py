"""Names of models: fluxfire's own models, folders, and ids of the Hugging Face hub.

This module loads no torch, so that the command line refuses a wrong name at once.
"""

from __future__ import annotations

from pathlib import Path

from fluxfire.errors import LoadError

SPARK = "spark"
"""The small trained Kontext that ships with fluxfire."""
RANDOM = ("random-tiny", "random-full")
"""Kontext models with random weights."""
KONTEXT = "black-forest-labs/FLUX.1-Kontext-dev"
"""The real model's hub id."""


def model_folder(model: str) -> Path | None:
    """Return the folder that a name means; None for a model of fluxfire or a hub id.

    Raises:
        LoadError: the name means none of these. This does not use the network.
    """
    if model == SPARK or model in RANDOM:
        return None
    path = Path(model).expanduser()
    if path.exists():
        if not (path / "model_index.json").is_file():
            raise LoadError(
                f"{model} holds no diffusers pipeline: it has no model_index.json "
                f"(pipe.save_pretrained writes one)"
            )
        return path
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise LoadError(
            f"there is no folder {model}, and it is no hub id (such as {KONTEXT}); fluxfire "
            f"brings {', '.join((SPARK, *RANDOM))}"
        )
    return None
