"""Operators of torch's own kind, for what a compiled graph is to call and not to take apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def operator(fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function the operator `fluxfire::…` of its name, for any device.

    `torch.library.custom_op` does as much and more (gradients, aliases looked for), which takes
    the host many times as long at each call; here nothing comes between torch and the function.

    Args:
        fake: says what the results look like, from arguments without numbers.
    """

    def made(fn: Callable[..., Any]) -> Callable[..., Any]:
        name = f"fluxfire::{fn.__name__}"
        torch.library.define(name, torch.library.infer_schema(fn, mutates_args=()))
        torch.library.impl(name, "default", fn)
        torch.library.register_fake(name, fake)
        registered: Callable[..., Any] = getattr(torch.ops.fluxfire, fn.__name__).default
        return registered

    return made
