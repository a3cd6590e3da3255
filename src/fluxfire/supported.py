"""The architectures that fluxfire supports.

To add one, implement `Model` in a folder beside `kontext/`, and add it to `MODELS`.
"""

from __future__ import annotations

from typing import cast

from fluxfire.diffusers_types import Pipeline
from fluxfire.errors import FluxfireError
from fluxfire.kontext import KONTEXT
from fluxfire.model import Model

MODELS: tuple[Model, ...] = (KONTEXT,)


def refusal(pipe: object) -> str | None:
    """Return the reason why fluxfire cannot work on an object; None if it can."""
    model = find_model(pipe)
    if model is not None:
        return model.refusal(cast("Pipeline", pipe))
    known = [pipeline.__name__ for model in MODELS for pipeline in model.pipelines]
    names = f"{', '.join(known[:-1])} and {known[-1]}"
    return f"fluxfire works on {names}, not on {type(pipe).__name__}"


def model_of(pipe: object) -> Model:
    """Return the architecture of a pipeline.

    Raises:
        FluxfireError: fluxfire does not support the pipeline's class.
    """
    model = find_model(pipe)
    if model is None:
        raise FluxfireError(str(refusal(pipe)))
    return model


def find_model(pipe: object) -> Model | None:
    """Return the architecture of a pipeline, or None for any other object."""
    return next((model for model in MODELS if isinstance(pipe, model.pipelines)), None)
