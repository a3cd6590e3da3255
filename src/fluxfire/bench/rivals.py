"""Other libraries' ways to make a Kontext pipeline faster.

Each gets a pipeline of its own (`contenders.apart`): cache-dit leaves the transformer's forward
replaced behind it, and what torchao quantised nobody can restore.
"""

from __future__ import annotations

import ast
import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, ClassVar

import diffusers
import torch

from fluxfire.bench.contenders import Contender, Rival
from fluxfire.bench.workload import Workload
from fluxfire.kontext import blocks
from fluxfire.passes import Compile, ParaAttention
from fluxfire.protocol import Pass


@dataclass(frozen=True)
class CacheDit:
    """cache-dit's DBCache, as it comes, or set to what our first-block cache does.

    Attributes:
        threshold: its `residual_diff_threshold`, with one block computed ahead, none after,
            and no steps before the first that may hit; None leaves all to its defaults.
        taylor: with its TaylorSeer calibrator, which extrapolates.
    """

    threshold: float | None = 0.12
    taylor: bool = False
    tells: ClassVar[bool] = False

    @contextmanager
    def applied(self, pipe: Any) -> Iterator[None]:
        """Enable its cache."""
        import cache_dit
        from cache_dit.caching.block_adapters.adapters import flux_adapter

        settings = {
            "Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": 0,
            "residual_diff_threshold": self.threshold,
        }  # fmt: skip
        config = cache_dit.DBCacheConfig(**(settings if self.threshold is not None else {}))
        extra = {"calibrator_config": cache_dit.TaylorSeerCalibratorConfig()} if self.taylor else {}
        with _quiet():
            adapter = flux_adapter(pipe)  # by hand: else it goes by the name of the class
            cache_dit.enable_cache(adapter, cache_config=config, **extra)
        try:
            yield
        finally:
            with _quiet():
                cache_dit.disable_cache(adapter)

    def begin(self, run: Callable[[], object], workload: Workload) -> None:
        """Do nothing: its cache begins anew with each call of the pipeline."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep cache-dit from telling of every layer on the standard output."""
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
    """diffusers' MagCache, calibrated on one run as its documentation asks.

    Attributes:
        threshold: the error that may gather, diffusers' default.
    """

    threshold: float = 0.06
    tells: ClassVar[bool] = False
    _transformer: Any = None
    _ratios: dict[Workload, list[float]] = field(default_factory=dict)

    @contextmanager
    def applied(self, pipe: Any) -> Iterator[None]:
        """Hold its hooks off until `begin` knows the number of steps, and take them away."""
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

        transformer, steps = self._transformer, workload.steps
        if transformer.is_cache_enabled:
            transformer.disable_cache()
        if workload not in self._ratios:
            transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=steps))
            with redirect_stdout(io.StringIO()) as printed:  # it tells the ratios in no other way
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
    """torchao's dynamic float8, scaled by row, under regional compilation: its own recipe."""

    tells: ClassVar[bool] = True

    @contextmanager
    def applied(self, pipe: Any) -> Iterator[None]:
        """Quantise the linear layers of the blocks, and compile these."""
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            PerRow,
            quantize_,
        )

        config = Float8DynamicActivationFloat8WeightConfig(
            granularity=PerRow(), set_inductor_config=False
        )
        for block in blocks(pipe.transformer):
            quantize_(block, config)
            block.compile(fullgraph=True)
        yield

    def begin(self, run: Callable[[], object], workload: Workload) -> None:
        """Do nothing."""


def decides_by_content(contender: Contender) -> bool:
    """Whether what a rival leaves out depends on the pictures: on noise that means nothing."""
    return contender.rival is None or not contender.rival.tells


def installed() -> list[Contender]:
    """Return the rivals that can run here, eager and, where they bear it, compiled."""
    found: list[Contender] = []

    def add(name: str, rival: Rival | None = None, passes: tuple[Pass, ...] = ()) -> None:
        found.append(Contender(name, passes, "rival", rival=rival))
        found.append(Contender(f"{name}, compiled", (*passes, Compile()), "rival", rival=rival))

    if find_spec("cache_dit") is not None:
        add("cache-dit as it comes", CacheDit(threshold=None))
        add("cache-dit F1B0 0.12", CacheDit())
        add("cache-dit F1B0 0.12, TaylorSeer", CacheDit(taylor=True))
    if hasattr(diffusers, "MagCacheConfig"):  # since 0.36; it cannot be compiled in one graph
        found.append(Contender("diffusers MagCache 0.06", (), "rival", rival=MagCache()))
    if find_spec("para_attn") is not None:
        add("para-attn 0.12", passes=(ParaAttention(0.12),))
    if find_spec("torchao") is not None and torch.cuda.is_available():
        found.append(
            Contender("torchao float8 by row, compiled", (), "rival", rival=TorchaoFloat8())
        )
    return found
