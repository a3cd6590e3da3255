"""A reference for rounding errors: the same model in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch.overrides import TorchFunctionMode

from fluxfire.diffusers_types import DiffusersPipeline, Pipeline, Transformer, Vae


def forward_errors(
    plain: DiffusersPipeline,
    optimized: DiffusersPipeline,
    run: Callable[[DiffusersPipeline], object],
) -> tuple[float, float]:
    """Compare the first transformer call of a run with the same call in float64.

    Args:
        plain: a pipeline without passes.
        optimized: a pipeline with the same weights and with passes.
        run: generates with the given pipeline.

    Returns:
        Relative errors ‖Δ‖/‖exact‖ of the optimized call, and of plain eager on the same inputs.
        They compare only the tokens that the optimized call returns, noise first.
    """
    inputs, output = first_call(optimized, run)
    with torch.no_grad():
        eager = plain.transformer(**_map(inputs, torch.Tensor.clone))[0]
        double = copy.deepcopy(plain.transformer).double()
        with _KeepDouble():
            exact = double(**_map(inputs, _to_double))[0]
    tokens = output.shape[1]
    return _error(output, exact[:, :tokens]), _error(eager[:, :tokens], exact[:, :tokens])


def first_call(
    pipe: Pipeline, run: Callable[[DiffusersPipeline], object]
) -> tuple[dict[str, Any], torch.Tensor]:
    """Return the arguments and the output of the transformer's first call in a run."""
    with _first_call(pipe.transformer) as seen:
        run(pipe)
    return seen[0]


def decoding_errors(plain: Pipeline, optimized: Pipeline) -> tuple[float, float]:
    """Return the relative errors of decoding fixed latents: optimized, and plain eager."""
    vae = cast("Vae", plain.vae)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, vae.config.latent_channels, 8, 8, generator=generator)
    latents = latents.to(vae.device, vae.dtype)
    with torch.no_grad():
        exact = copy.deepcopy(vae).double().decode(latents.double()).sample
        ours, eager = (cast("Vae", pipe.vae).decode(latents).sample for pipe in (optimized, plain))
    return _error(ours, exact), _error(eager, exact)


class _KeepDouble(TorchFunctionMode):
    """Turns `.float()` into `.double()`, because diffusers computes embeddings in float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func is torch.Tensor.float:
            return args[0].double()
        return func(*args, **(kwargs or {}))


@contextmanager
def _first_call(transformer: Transformer) -> Iterator[list[tuple[dict[str, Any], torch.Tensor]]]:
    """Record inputs and output of the transformer's first call, from outside any graph."""
    plain = type(transformer)
    seen: list[tuple[dict[str, Any], torch.Tensor]] = []

    def __call__(self: Any, **inputs: Any) -> Any:  # noqa: N807
        copied = _map(inputs, torch.Tensor.clone) if not seen else {}
        out = plain.__call__(self, **inputs)
        if not seen:
            seen.append((copied, out[0].clone()))
        return out

    transformer.__class__ = type(plain.__name__, (plain,), {"__call__": __call__})
    try:
        yield seen
    finally:
        transformer.__class__ = plain


def _map(value: Any, fn: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return fn(value)
    if isinstance(value, dict):
        return {k: _map(v, fn) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map(v, fn) for v in value)
    return value


def _to_double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())
