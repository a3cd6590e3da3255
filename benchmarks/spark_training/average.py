"""Copies of weights beside the ones that compute: masters in float32, and their average."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def parameters(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """List the modules' parameters, shared ones once."""
    return [p for m in modules for p in m.parameters()]


class Masters:
    """Weights in float32 for an optimizer, while a model computes in bfloat16.

    Attributes:
        values: the weights, with their gradients.
        gradients: all gradients in one tensor, for several processes to average.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self.values = [p.detach().float().clone() for p in self._parameters]
        sizes = [value.numel() for value in self.values]
        self.gradients = torch.zeros(sum(sizes), device=self.values[0].device)
        for value, part in zip(self.values, torch.split(self.gradients, sizes), strict=True):
            value.grad = part.view_as(value)

    def take_gradients(self) -> None:
        """Move the model's gradients here."""
        held = [value.grad for value in self.values if value.grad is not None]
        given = [p.grad for p in self._parameters if p.grad is not None]
        copy(given, held)
        for parameter in self._parameters:
            parameter.grad = None

    def give(self) -> None:
        """Round the weights into the model."""
        copy(self.values, self._parameters)


class Average:
    """An exponential moving average of tensors: what is evaluated and shipped.

    Attributes:
        values: the averages.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        *,
        decay: float = 0.9995,
        start: Sequence[Tensor] | None = None,
    ) -> None:
        self._tensors = tensors
        self._decay = decay
        self._steps = 0 if start is None else 10_000
        self.values = [t.detach().clone() for t in start or tensors]

    @torch.no_grad()
    def update(self) -> None:
        """Take the present values in; early on they count more."""
        self._steps += 1
        keep = min(self._decay, (1 + self._steps) / (10 + self._steps))
        torch._foreach_lerp_(self.values, [t.detach() for t in self._tensors], 1 - keep)


@contextmanager
def holding(modules: Sequence[nn.Module], values: Sequence[Tensor]) -> Iterator[None]:
    """Let modules compute with other weights for a while."""
    weights = parameters(modules)
    own = [p.detach().clone() for p in weights]
    copy(values, weights)
    try:
        yield
    finally:
        copy(own, weights)


@torch.no_grad()
def copy(values: Sequence[Tensor], to: Sequence[Tensor]) -> None:
    """Copy values into weights, rounding to their dtype."""
    torch._foreach_copy_([t.detach() for t in to], list(values))
