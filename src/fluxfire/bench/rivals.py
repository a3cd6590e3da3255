"""Other libraries' ways to make a Kontext pipeline faster, each as its documentation says.

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
from typing import Any

import diffusers
import torch

from fluxfire.bench.contenders import Contender
from fluxfire.kontext import blocks
from fluxfire.passes import Compile, ParaAttention


@dataclass(frozen=True)
class CacheDit:
    """cache-dit's DBCache with one block computed ahead and none after, at a threshold.

    Attributes:
        threshold: its `residual_diff_threshold`.
        taylor: with its TaylorSeer calibrator, which extrapolates.
    """

    threshold: float = 0.12
    taylor: bool = False

    @contextmanager
    def applied(self, pipe: Any) -> Iterator[None]:
        """Enable its cache."""
        logging.getLogger("CACHE_DIT").setLevel(logging.WARNING)  # it tells of every layer
        import cache_dit
        from cache_dit.caching.block_adapters.adapters import flux_adapter

        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=self.threshold
        )
        extra = {"calibrator_config": cache_dit.TaylorSeerCalibratorConfig()} if self.taylor else {}
        adapter = flux_adapter(pipe)  # by hand, since it goes by the name of the class otherwise
        cache_dit.enable_cache(adapter, cache_config=config, **extra)
        try:
            yield
        finally:
            cache_dit.disable_cache(adapter)

    def begin(self, run: Callable[[], object], steps: int) -> None:
        """Do nothing: its cache begins anew with each call of the pipeline."""


@dataclass
class MagCache:
    """diffusers' MagCache, calibrated on one run as its documentation asks.

    Attributes:
        threshold: the error that may gather, diffusers' default.
    """

    threshold: float = 0.06
    _transformer: Any = None
    _ratios: dict[int, list[float]] = field(default_factory=dict)

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

    def begin(self, run: Callable[[], object], steps: int) -> None:
        """Calibrate for this number of steps, once, and start from a clean state."""
        from diffusers import MagCacheConfig

        transformer = self._transformer
        if transformer.is_cache_enabled:
            transformer.disable_cache()
        if steps not in self._ratios:
            transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=steps))
            with redirect_stdout(io.StringIO()) as printed:  # it tells the ratios in no other way
                run()
            transformer.disable_cache()
            self._ratios[steps] = ast.literal_eval(printed.getvalue().strip().splitlines()[-1])
        transformer.enable_cache(
            MagCacheConfig(
                threshold=self.threshold, num_inference_steps=steps, mag_ratios=self._ratios[steps]
            )
        )


@dataclass(frozen=True)
class TorchaoFloat8:
    """torchao's dynamic float8, scaled by row, under regional compilation: its own recipe."""

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

    def begin(self, run: Callable[[], object], steps: int) -> None:
        """Do nothing."""


def decides_by_content(contender: Contender) -> bool:
    """Whether what a rival leaves out depends on the pictures: on noise that means nothing."""
    return not isinstance(contender.rival, TorchaoFloat8)


def installed() -> list[Contender]:
    """Return the rivals that can run here, eager and, where they bear it, compiled."""
    found = []
    if find_spec("cache_dit") is not None:
        for taylor in (False, True):
            name = f"cache-dit F1B0 0.12{', TaylorSeer' if taylor else ''}"
            found.append(Contender(name, (), "rival", rival=CacheDit(taylor=taylor)))
            found.append(
                Contender(f"{name}, compiled", (Compile(),), "rival", rival=CacheDit(taylor=taylor))
            )
    if hasattr(diffusers, "MagCacheConfig"):  # since 0.36
        found.append(Contender("diffusers MagCache 0.06", (), "rival", rival=MagCache()))
    if find_spec("para_attn") is not None:
        found.append(Contender("para-attn 0.12", (ParaAttention(0.12),), "rival"))
    if find_spec("torchao") is not None and torch.cuda.is_available():
        found.append(
            Contender("torchao float8 by row, compiled", (), "rival", rival=TorchaoFloat8())
        )
    return found
