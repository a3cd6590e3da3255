"""Custom torch operators: functions that a compiled graph calls and does not trace into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def operator(fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the operator `fluxfire::<its name>`, for any device.

    `torch.library.custom_op` also handles gradients and checks for aliases, which makes every call
    many times slower on the host. This decorator adds nothing to a call.

    Args:
        fake: returns tensors of the results' shape and dtype, from arguments without data.
    """

    def made(fn: Callable[..., Any]) -> Callable[..., Any]:
        name = f"fluxfire::{fn.__name__}"
        torch.library.define(name, torch.library.infer_schema(fn, mutates_args=()))
        torch.library.impl(name, "default", fn)
        torch.library.register_fake(name, fake)
        registered: Callable[..., Any] = getattr(torch.ops.fluxfire, fn.__name__).default
        return registered

    return made
