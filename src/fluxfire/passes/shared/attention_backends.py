"""Which attention kernel is the fastest on a device, by measuring."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Any, NamedTuple

import torch
from diffusers.models import attention_dispatch
from torch import Tensor

from fluxfire.kernels.flash_attention import flash_attention
from fluxfire.reporting.device_events import Marks

NATIVE = "native"
FLASH_3 = "fa3"
"""Ours, by the package `fa3-fwd`; diffusers' `_flash_3` takes another one, which has no wheels."""
OFFERED = ("_native_cudnn", "_native_flash", "flash", "_flash_3", FLASH_3)
"""Exact backends that can be faster than diffusers' default, which leaves it to torch."""

_TOKENS = 8704  # an edit of one megapixel: 4096 of noise, 4096 of reference, 512 of text
_FEW = 64  # enough to see whether a kernel runs and compiles
_WARM_UP, _ROUNDS = 3, 15
_GAIN = 0.99  # of the native time: what is not clearly faster is not worth another kernel
_WRONG = 0.02  # relative; bfloat16 errs by about 0.003 from one kernel to another


class Sizes(NamedTuple):
    """What decides how fast a kernel is, but for the number of tokens."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    width: int


@dataclass(frozen=True)
class Fastest:
    """What came of measuring.

    Attributes:
        backend: the one to use.
        milliseconds: median of one call, by backend.
        failed: why the other backends were left out.
    """

    backend: str
    milliseconds: Mapping[str, float]
    failed: Mapping[str, str]

    def facts(self) -> Mapping[str, object]:
        """Return the same as plain data, for a report."""
        took = {name: round(ms, 3) for name, ms in self.milliseconds.items()}
        return {"backend": self.backend, "milliseconds": took, "left_out": dict(self.failed)}


@cache
def fastest(sizes: Sizes, offered: tuple[str, ...] = OFFERED) -> Fastest:
    """Measure the exact backends that run on a device, and choose.

    Args:
        sizes: of the attention.
        offered: which may be chosen, beside the native one.

    Returns:
        The choice: the fastest, unless the native one is as fast to a percent.
    """
    failed = {name: why for name in offered if (why := why_not(name, sizes)) is not None}
    names = [NATIVE, *(name for name in offered if name not in failed)]
    inputs = _inputs(sizes, _TOKENS)
    with torch.no_grad(), _on(sizes.device):
        seconds = _timed({name: _kernel(name) for name in names}, inputs)
    took = {name: 1e3 * s for name, s in seconds.items()}
    backend = chosen(took, lambda name: _compiles(name, sizes))
    return Fastest(backend, took, failed)


def chosen(took: Mapping[str, float], compiles: Callable[[str], bool]) -> str:
    """Choose by the time that each takes, and ask only of the fastest whether it compiles."""
    for name in sorted(took, key=lambda name: took[name]):
        if took[name] > _GAIN * took[NATIVE]:
            break
        if compiles(name):
            return name
    return NATIVE


def why_not(name: str, sizes: Sizes) -> str | None:
    """Say why a backend cannot compute an attention of these sizes, or None if it can."""
    inputs = _inputs(sizes, _FEW)
    try:
        if name == FLASH_3:
            _check_flash_3(sizes)
        else:
            backend = attention_dispatch.AttentionBackendName(name)
            attention_dispatch._check_attention_backend_requirements(backend)  # noqa: SLF001
        with torch.no_grad(), _on(sizes.device), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of each condition that is not met
            made, native = _kernel(name)(*inputs).float(), _kernel(NATIVE)(*inputs).float()
    except Exception as error:  # noqa: BLE001 - whatever keeps a kernel from running here
        said = str(error) or type(error).__name__
        return said.splitlines()[0].rstrip(".")
    off = float((made - native).norm() / native.norm())
    if "sage" not in name and not off <= _WRONG:  # nor if it is not a number
        return f"it is off the native result by {off:.3g}"
    return None


def _check_flash_3(sizes: Sizes) -> None:
    """Raise a RuntimeError that says what it lacks."""
    if sizes.device.type != "cuda":
        raise RuntimeError("FlashAttention-3 needs a GPU")
    if importlib.util.find_spec("fa3_fwd") is None:
        raise RuntimeError("FlashAttention-3 is not installed: pip install fa3-fwd")


def _kernel(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if name == FLASH_3:
        return flash_attention
    dispatch: Any = attention_dispatch.dispatch_attention_fn
    backend = attention_dispatch.AttentionBackendName(name)
    return lambda query, key, value: dispatch(query, key, value, backend=backend)


def _compiles(name: str, sizes: Sizes) -> bool:
    """Whether a backend stays in one graph; tracing says so, without generating code."""
    traced = torch.compile(_kernel(name), fullgraph=True, backend="eager")
    try:
        with torch.no_grad(), _on(sizes.device):
            traced(*_inputs(sizes, _FEW))
    except Exception:  # noqa: BLE001 - dynamo's errors have no common class
        return False
    return True


def _timed(
    kernels: Mapping[str, Callable[..., Tensor]], inputs: Iterable[Tensor]
) -> dict[str, float]:
    """Return the median seconds of each; they take turns, so that a slower clock hits all."""
    inputs = tuple(inputs)
    marks = Marks(inputs[0].device)
    spans: dict[str, list[tuple[Callable[[], float], ...]]] = {name: [] for name in kernels}
    for _ in range(_WARM_UP + _ROUNDS):
        for name, kernel in kernels.items():
            start = marks.now()
            kernel(*inputs)
            spans[name].append((start, marks.now()))
    return {
        name: median(end() - start() for start, end in pairs[_WARM_UP:])
        for name, pairs in spans.items()
    }


def _on(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _inputs(sizes: Sizes, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Make a query, key and value: (1, tokens, heads, width), random; the seed is their own."""
    generator = torch.Generator(sizes.device).manual_seed(0)
    query, key, value = (
        torch.randn(
            1, tokens, sizes.heads, sizes.width,
            generator=generator, device=sizes.device, dtype=sizes.dtype,
        )
        for _ in range(3)
    )  # fmt: skip
    return query, key, value
