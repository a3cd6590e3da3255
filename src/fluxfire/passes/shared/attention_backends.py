"""Measures which attention kernel is the fastest on a device."""

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
from fluxfire.reporting.device_events import DeviceClock

NATIVE = "native"
FLASH_3 = "fa3"
"""fluxfire's FlashAttention-3 backend, from the package `fa3-fwd`. diffusers' own `_flash_3` needs
another package, which has no wheels."""
CANDIDATES = ("_native_cudnn", "_native_flash", "flash", "_flash_3", FLASH_3)
"""Exact backends that may be faster than diffusers' default, where torch chooses the kernel."""

_TOKENS = 8704  # an edit of one megapixel: 4096 noise, 4096 reference and 512 text tokens
_FEW = 64  # tokens; enough to see whether a kernel runs and compiles
_WARM_UP, _ROUNDS = 3, 15
_GAIN = 0.99  # of the native time: a smaller gain does not justify another kernel
_WRONG = 0.02  # relative error; in bfloat16 two correct kernels differ by about 0.003


class Sizes(NamedTuple):
    """What a kernel's time depends on, apart from the number of tokens."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    width: int


@dataclass(frozen=True)
class Measured:
    """The result of measuring the backends.

    Attributes:
        backend: the backend to use.
        milliseconds: median time of one call, by backend.
        failed: why a backend was not measured, by backend.
    """

    backend: str
    milliseconds: Mapping[str, float]
    failed: Mapping[str, str]

    def facts(self) -> Mapping[str, object]:
        """Return the result as plain data, for a report."""
        times = {name: round(ms, 3) for name, ms in self.milliseconds.items()}
        return {"backend": self.backend, "milliseconds": times, "left_out": dict(self.failed)}


@cache
def measure(sizes: Sizes, candidates: tuple[str, ...] = CANDIDATES) -> Measured:
    """Measure the exact backends that run on a device, and choose one.

    Args:
        sizes: device, dtype, number of heads and head width.
        candidates: the backends to measure, in addition to the native one.

    Returns:
        The times, and the fastest backend; or the native one unless another is 1% faster.
    """
    problems = {name: find_problem(name, sizes) for name in candidates}
    failed = {name: problem for name, problem in problems.items() if problem is not None}
    names = [NATIVE, *(name for name in candidates if name not in failed)]
    inputs = _random_inputs(sizes, _TOKENS)
    with torch.no_grad(), _current_device(sizes.device):
        seconds = _time_in_turns({name: _kernel(name) for name in names}, inputs)
    milliseconds = {name: 1e3 * s for name, s in seconds.items()}
    backend = choose_backend(milliseconds, lambda name: _compiles(name, sizes))
    return Measured(backend, milliseconds, failed)


def choose_backend(milliseconds: Mapping[str, float], compiles: Callable[[str], bool]) -> str:
    """Return the fastest backend that compiles and beats the native one, or the native one.

    Args:
        milliseconds: time of one call, by backend.
        compiles: whether a backend compiles. This is slow, so it is called for the fastest first.
    """
    for name in sorted(milliseconds, key=lambda name: milliseconds[name]):
        if milliseconds[name] > _GAIN * milliseconds[NATIVE]:
            break
        if compiles(name):
            return name
    return NATIVE


def find_problem(name: str, sizes: Sizes) -> str | None:
    """Return why a backend cannot compute an attention of these sizes; None if it can."""
    inputs = _random_inputs(sizes, _FEW)
    try:
        if name == FLASH_3:
            _check_flash_3(sizes)
        else:
            backend = attention_dispatch.AttentionBackendName(name)
            attention_dispatch._check_attention_backend_requirements(backend)  # noqa: SLF001
        with torch.no_grad(), _current_device(sizes.device), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about every unmet condition of a kernel
            result, native = _kernel(name)(*inputs).float(), _kernel(NATIVE)(*inputs).float()
    except Exception as error:  # noqa: BLE001 - kernels fail with errors of any class
        message = str(error) or type(error).__name__
        return message.splitlines()[0].rstrip(".")
    distance = float((result - native).norm() / native.norm())
    if "sage" not in name and not distance <= _WRONG:  # "not <=" also catches NaN
        return f"it is off the native result by {distance:.3g}"
    return None


def _check_flash_3(sizes: Sizes) -> None:
    """Raise a RuntimeError if the device or the package is missing."""
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
    """Whether a backend compiles without a graph break. Tracing shows it; no code is generated."""
    traced = torch.compile(_kernel(name), fullgraph=True, backend="eager")
    try:
        with torch.no_grad(), _current_device(sizes.device):
            traced(*_random_inputs(sizes, _FEW))
    except Exception:  # noqa: BLE001 - dynamo's errors have no common base class
        return False
    return True


def _time_in_turns(
    kernels: Mapping[str, Callable[..., Tensor]], inputs: Iterable[Tensor]
) -> dict[str, float]:
    """Return the median seconds of each kernel.

    The kernels alternate, so that a GPU that lowers its clock slows all of them alike.
    """
    inputs = tuple(inputs)
    clock = DeviceClock(inputs[0].device)
    spans: dict[str, list[tuple[Callable[[], float], ...]]] = {name: [] for name in kernels}
    for _ in range(_WARM_UP + _ROUNDS):
        for name, kernel in kernels.items():
            start = clock.mark()
            kernel(*inputs)
            spans[name].append((start, clock.mark()))
    return {
        name: median(end() - start() for start, end in pairs[_WARM_UP:])
        for name, pairs in spans.items()
    }


def _current_device(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _random_inputs(sizes: Sizes, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return random query, key and value, each (1, tokens, heads, width), from a fixed seed."""
    generator = torch.Generator(sizes.device).manual_seed(0)
    query, key, value = (
        torch.randn(
            1,
            tokens,
            sizes.heads,
            sizes.width,
            generator=generator,
            device=sizes.device,
            dtype=sizes.dtype,
        )
        for _ in range(3)
    )
    return query, key, value
