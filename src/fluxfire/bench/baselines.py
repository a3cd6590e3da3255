"""Baselines: other libraries that make a Kontext pipeline faster, at their recommended settings.

Each baseline runs on its own copy of the pipeline (`contenders.separate_copy`): cache-dit leaves
the transformer's forward replaced, and nobody can undo torchao's quantization.
"""

from __future__ import annotations

import ast
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, ClassVar, cast

import diffusers
import torch

from fluxfire.bench.contenders import Baseline, Contender
from fluxfire.bench.workload import Workload
from fluxfire.diffusers_types import Pipeline, Transformer
from fluxfire.errors import BenchError
from fluxfire.passes import Compile, ParaAttention
from fluxfire.protocol import Pass
from fluxfire.supported import model_of
from fluxfire.text import did_you_mean, extra_hint

_ADVISED_STEPS = 28  # the number of steps that the recommendations for FLUX assume


@dataclass(frozen=True)
class CacheDit:
    """cache-dit's DBCache, which computes the first blocks and none of the last blocks.

    The defaults are its documentation's example for FLUX-like models: threshold 0.12, 8 warm-up
    steps, at most 2 cached steps in a row.

    Attributes:
        threshold: its `residual_diff_threshold`.
        taylor: whether to use its TaylorSeer calibrator of order 1, which extrapolates.
        warmup_steps: its `max_warmup_steps`; 0 for none.
        max_consecutive_hits: its `max_continuous_cached_steps`; -1 for no limit.
        first_blocks: its `Fn_compute_blocks`: how many blocks every step computes.
    """

    threshold: float = 0.12
    taylor: bool = False
    warmup_steps: int = 8
    max_consecutive_hits: int = 2
    first_blocks: int = 1
    skips: ClassVar[bool] = True
    compiles: ClassVar[bool] = False

    @contextmanager
    def applied(self, pipe: Pipeline) -> Iterator[None]:
        """Enable cache-dit's cache for the length of a `with` block."""
        import cache_dit
        from cache_dit.caching.block_adapters.adapters import flux_adapter

        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=self.first_blocks,
            Bn_compute_blocks=0,
            residual_diff_threshold=self.threshold,
            max_warmup_steps=self.warmup_steps,
            max_continuous_cached_steps=self.max_consecutive_hits,
        )
        more: dict[str, Any] = {}
        if self.taylor:
            more["calibrator_config"] = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1)
        with _quiet():
            adapter = flux_adapter(
                pipe
            )  # explicit, because cache-dit recognizes pipelines by class name
            cache_dit.enable_cache(adapter, cache_config=config, **more)
        try:
            yield
        finally:
            with _quiet():
                cache_dit.disable_cache(adapter)

    def begin(self, run: Callable[[], object], workload: Workload) -> None:
        """Do nothing: the cache resets itself at each call of the pipeline."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep cache-dit from logging every layer."""
    handlers = [(h, h.level) for h in logging.getLogger("CACHE_DIT").handlers]
    for handler, _ in handlers:
        handler.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for handler, level in handlers:
            handler.setLevel(level)


@dataclass
class MagCache:
    """diffusers' MagCache, calibrated on one run as its documentation recommends.

    Its warm-up is a fifth of the steps.

    Attributes:
        threshold: the largest accumulated error; diffusers' default.
    """

    threshold: float = 0.06
    skips: ClassVar[bool] = True
    compiles: ClassVar[bool] = False
    _transformer: Transformer | None = None
    _ratios: dict[Workload, list[float]] = field(default_factory=dict)

    @contextmanager
    def applied(self, pipe: Pipeline) -> Iterator[None]:
        """Disable the cache at the end; `begin` enables it, since only `begin` knows the steps."""
        self._transformer = pipe.transformer
        try:
            yield
        finally:
            if pipe.transformer.is_cache_enabled:
                pipe.transformer.disable_cache()
            self._transformer = None

    def begin(self, run: Callable[[], object], workload: Workload) -> None:
        """Calibrate for this workload, once, and start from a clean state."""
        from diffusers import MagCacheConfig

        transformer, steps = cast("Transformer", self._transformer), workload.steps
        if transformer.is_cache_enabled:
            transformer.disable_cache()
        if workload not in self._ratios:
            transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=steps))
            with redirect_stdout(io.StringIO()) as printed:  # MagCache only prints the ratios
                run()
            transformer.disable_cache()
            self._ratios[workload] = ast.literal_eval(printed.getvalue().strip().splitlines()[-1])
        transformer.enable_cache(
            MagCacheConfig(
                threshold=self.threshold,
                num_inference_steps=steps,
                mag_ratios=self._ratios[workload],
            )
        )


@dataclass(frozen=True)
class TorchaoFloat8:
    """torchao's dynamic float8 with row-wise scales and compiled blocks, as torchao recommends."""

    skips: ClassVar[bool] = False
    compiles: ClassVar[bool] = True

    @contextmanager
    def applied(self, pipe: Pipeline) -> Iterator[None]:
        """Quantize the linear layers of the blocks, and compile the blocks."""
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            PerRow,
            quantize_,
        )

        config = Float8DynamicActivationFloat8WeightConfig(
            granularity=PerRow(), set_inductor_config=False
        )
        for block in model_of(pipe).blocks(pipe.transformer):
            quantize_(block, config)
            block.compile(fullgraph=True)
        yield

    def begin(self, run: Callable[[], object], workload: Workload) -> None:
        """Do nothing."""


def decides_by_content(contender: Contender) -> bool:
    """Whether a baseline chooses steps to skip by content; on noise its choice means nothing."""
    return contender.baseline is None or contender.baseline.skips


def _cache_dit(steps: int) -> list[Contender]:
    warmup = -(-8 * steps // _ADVISED_STEPS)
    name = f"cache-dit F1B0 W{warmup} 0.12"
    return [
        *_both(name, CacheDit(warmup_steps=warmup)),
        *_both(f"{name}, TaylorSeer", CacheDit(taylor=True, warmup_steps=warmup)),
    ]


def _mag_cache(_steps: int) -> list[Contender]:
    # It cannot be compiled in one graph.
    return [Contender("diffusers MagCache 0.06", (), "baseline", baseline=MagCache())]


def _para_attn(_steps: int) -> list[Contender]:
    return _both("para-attn 0.08", passes=(ParaAttention(0.08),))


def _torchao(_steps: int) -> list[Contender]:
    name = "torchao float8 by row, compiled"
    return [Contender(name, (), "baseline", baseline=TorchaoFloat8())]


def _both(
    name: str, baseline: Baseline | None = None, passes: tuple[Pass, ...] = ()
) -> list[Contender]:
    """Return a baseline twice: eager and compiled."""
    return [
        Contender(name, passes, "baseline", baseline=baseline),
        Contender(f"{name}, compiled", (*passes, Compile()), "baseline", baseline=baseline),
    ]


_MAKERS: dict[str, Callable[[int], list[Contender]]] = {
    "cache-dit": _cache_dit,
    "mag-cache": _mag_cache,
    "para-attn": _para_attn,
    "torchao": _torchao,
}
NAMES = tuple(_MAKERS)
"""Names of the baselines, for `fluxfire bench --baselines`."""


def missing(name: str) -> str | None:
    """Return what this machine lacks to run a baseline, or None.

    Args:
        name: one of `NAMES`.
    """
    if name == "mag-cache":  # since diffusers 0.36
        return None if hasattr(diffusers, "MagCacheConfig") else "diffusers 0.36 or newer"
    package = {"cache-dit": "cache_dit", "para-attn": "para_attn", "torchao": "torchao"}[name]
    if find_spec(package) is None:
        install = extra_hint(name) if name == "para-attn" else f"pip install {name}"
        return f"the package {name}: {install}"
    if name == "torchao" and not torch.cuda.is_available():
        return "a CUDA device"
    return None


def choose(names: Sequence[str] | None = None, *, steps: int = _ADVISED_STEPS) -> list[Contender]:
    """Return baselines at their authors' recommended settings, eager and compiled.

    Args:
        names: from `NAMES`; None for all baselines that can run on this machine.
        steps: number of denoising steps.

    Raises:
        BenchError: a name is unknown, or its baseline cannot run on this machine.
    """
    if names is None:
        names = [name for name in NAMES if missing(name) is None]
    found: list[Contender] = []
    for name in names:
        if name not in NAMES:
            raise BenchError(
                f"there is no baseline {name!r}; there are {', '.join(NAMES)}"
                f"{did_you_mean(name, NAMES)}"
            )
        if (lack := missing(name)) is not None:
            raise BenchError(f"the baseline {name} needs {lack}")
        found += _MAKERS[name](steps)
    return found
