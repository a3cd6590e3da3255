"""What a user writes, for the type checker alone: `nox -s typing` reads it, nothing runs it.

Where a name of fluxfire's interface were Any, or of another type than told, it would complain;
so it would if an error that is expected here, and ignored by its code, did not come.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, assert_type

import torch
from diffusers import FluxKontextPipeline
from fastapi import FastAPI

import fluxfire
from fluxfire import Change, Finding, Pass, Target, presets
from fluxfire.bench import Tuned, Workload, held_out
from fluxfire.errors import FluxfireError, PassError, PlanError, RestoreError
from fluxfire.extend import AttentionModule, Transaction, Transformer, model_of
from fluxfire.extend import Pipeline as SeenPipeline
from fluxfire.passes import Compile, FirstBlockCache, FusedBlocks, InductorPatch, MegaCache
from fluxfire.planning.plan import Plan
from fluxfire.protocol import Exactness, Stage, Trait
from fluxfire.reporting.report import PassReport, Report
from fluxfire.reporting.statistics import RunStatistics
from fluxfire.serve import Settings, create_app
from fluxfire.spark import SparkPipeline
from fluxfire.testing import check_pass, edit, tiny_kontext


class Pipeline:
    """Stands for a pipeline whose type is known."""


def optimize_and_restore(pipe: Pipeline) -> Pipeline:
    """The verbs give the very type that they were given."""
    assert_type(fluxfire.optimize(pipe), Pipeline)
    assert_type(fluxfire.optimize(pipe, "fast"), Pipeline)
    assert_type(fluxfire.optimize(pipe, "tuned.json"), Pipeline)
    assert_type(fluxfire.optimize(pipe, passes=[InductorPatch(), "compile"]), Pipeline)
    with fluxfire.optimized(pipe, presets.balanced) as faster:
        assert_type(faster, Pipeline)
    with fluxfire.using(pipe, FirstBlockCache(0.2)) as same:
        assert_type(same, Pipeline)
    with fluxfire.using(pipe, [FirstBlockCache(threshold=0.2)]):
        pass
    fluxfire.optimize(pipe, passes=Compile())  # type: ignore[arg-type]
    fluxfire.optimize(pipe, 3)  # type: ignore[arg-type]
    fluxfire.optimise(pipe)  # type: ignore[attr-defined]
    return fluxfire.restore(pipe)


def real_pipeline(pipe: FluxKontextPipeline) -> FluxKontextPipeline:
    """A pipeline of diffusers goes in, though mypy sees it as an empty placeholder class."""
    assert_type(fluxfire.optimize(pipe), FluxKontextPipeline)
    assert_type(fluxfire.warmup(pipe, [(1024, 1024)]), FluxKontextPipeline)
    assert_type(fluxfire.plan(pipe), Plan)
    assert_type(fluxfire.report(pipe), Report)
    fluxfire.tune(pipe, held_out(8), fluxfire.Budget(min_psnr=40))
    picture = Workload.for_pipeline(pipe).run(pipe, held_out(1)[0])
    picture.save("picture.png")
    edit(pipe)
    with fluxfire.optimized(pipe) as faster:
        assert_type(faster, FluxKontextPipeline)
    return fluxfire.restore(pipe)


def loaded_pipeline() -> None:
    """A pipeline that fluxfire loads has whatever diffusers gives it."""
    pipe = fluxfire.load("black-forest-labs/FLUX.1-Kontext-dev")
    pipe.load_lora_weights("a/lora")
    fluxfire.optimize(pipe)(prompt="make it night").images[0].save("picture.png")


def warm_up(pipe: Pipeline) -> Pipeline:
    """Sizes are pairs of integers; the pictures in a call and the text tokens are integers."""
    fluxfire.warmup(pipe, [(1024, 1024)], batch=(1, 4), text=512)
    fluxfire.warmup(pipe, [(1024, 1024)], batch=1.5)  # type: ignore[arg-type]
    fluxfire.warmup(pipe, [(1024, 1024)], references=[(1360, 768)], prompt=["a", "b"])
    fluxfire.warmup(pipe, [(1024, 1024, 3)])  # type: ignore[list-item]
    fluxfire.warmup(pipe, [1024])  # type: ignore[list-item]
    return assert_type(fluxfire.warmup(pipe, sizes=[(1024, 1024)]), Pipeline)


def look(pipe: Pipeline) -> None:
    """Plans and reports are data."""
    plan = assert_type(fluxfire.plan(pipe, ["qkv-fusion"]), Plan)
    assert_type(plan.ok, bool)
    assert_type(plan.problems, tuple[str, ...])
    for step in plan.steps:
        assert_type(step.pass_, Pass)
        assert_type(step.findings, tuple[Finding, ...])
    report = assert_type(fluxfire.report(pipe), Report)
    assert_type(report.passes, tuple[PassReport, ...])
    assert_type(report.runs, tuple[RunStatistics, ...])
    assert_type(report.runs[-1].step_kinds, list[Literal["computed", "reused", "hit"]])
    assert_type(report.warmup_seconds, float | None)
    assert_type(report.to_dict(), dict[str, Any])
    assert_type(fluxfire.order([Compile(), InductorPatch()]), list[Pass])


def slice_presets() -> tuple[Pass, ...]:
    """Presets are tuples of passes."""
    assert_type(presets.faithful, tuple[Pass, ...])
    assert_type(presets.article[-1], Pass)
    return (
        *presets.faithful[:-1],
        FirstBlockCache(0.12),
        MegaCache("kontext.megacache"),
        Compile(),
    )


def settings() -> None:
    """A pass's fields are typed, and its options are keywords."""
    FirstBlockCache("0.12")  # type: ignore[arg-type]
    FirstBlockCache(0.12, 3)  # type: ignore[call-arg]
    FusedBlocks(no_such_option=1)  # type: ignore[call-arg]
    assert_type(FirstBlockCache(0.12).threshold, float)
    assert_type(MegaCache("file").exactness, Exactness)


def tune() -> None:
    """What is found is a list of passes, on Spark as on any pipeline."""
    pipe = assert_type(fluxfire.spark.load(device="cpu"), SparkPipeline)
    budget = fluxfire.Budget(min_psnr=40)
    found = assert_type(fluxfire.tune(pipe, held_out(8), budget), Tuned)
    assert_type(found.passes, tuple[Pass, ...])
    assert_type(found.speed, float)
    assert_type(fluxfire.optimize(pipe, found.passes), SparkPipeline)
    fluxfire.Budget(psnr=40)  # type: ignore[call-arg]
    fluxfire.spark.lode()  # type: ignore[attr-defined]


def serve() -> None:
    """Settings are fields, and the application is FastAPI's."""
    assert_type(create_app(Settings(port=8080)), FastAPI)
    Settings(prot=8080)  # type: ignore[call-arg]


def errors(pipe: Pipeline) -> str:
    """All are FluxfireErrors; some carry more."""
    try:
        fluxfire.optimize(pipe)
    except PassError as error:
        return assert_type(error.pass_name, str)
    except RestoreError as error:
        assert_type(error.failures, tuple[Exception, ...])
    except (PlanError, FluxfireError) as error:
        return str(error)
    return ""


@dataclass(frozen=True, kw_only=True)
class Sharpen:
    """A pass of the user's own, which inherits nothing."""

    strength: float = 1.0

    name: ClassVar[str] = "sharpen"
    stage: ClassVar[Stage] = "weights"
    slot: ClassVar[str | None] = None

    @property
    def exactness(self) -> Exactness:
        """Bitwise where it does nothing."""
        return "lossy" if self.strength else "bitwise"

    def check(self, target: Target) -> Iterable[Finding]:
        """Look at what there is."""
        assert_type(target.traits, frozenset[Trait])
        assert_type(target.environment.packages, dict[str, str | None])
        assert_type(target.environment.capability, tuple[int, int] | None)
        for other in target.passes:
            assert_type(other.settings, Mapping[str, Any])
            assert_type(other.stage, Stage)
        yield Finding("warning", "this sharpens", "leave it out")
        yield Finding("fatal", "there is no such level")  # type: ignore[arg-type]

    def apply(self, tx: Transaction) -> Change:
        """Change what there is."""
        tx.setattr(tx.pipe, "sharpness", self.strength)
        assert_type(tx.pipe, SeenPipeline)
        assert_type(tx.pipe.transformer, Transformer)
        assert_type(tx.pipe.transformer.dtype, torch.dtype)
        attentions = model_of(tx.pipe).attentions(tx.pipe.transformer)
        assert_type(attentions, list[AttentionModule])
        _ = tx.pipe.transfomer  # type: ignore[attr-defined]
        whole: Any = tx.pipe
        whole.transformer.proj_out.requires_grad_(requires_grad=False)
        assert_type(tx.live(self).settings, Sharpen)
        tx.on_undo(lambda: None)
        assert_type(tx.enter(nullcontext("inside")), str)
        return Change(1, "sharpness set", bytes=0)


@dataclass(frozen=True, kw_only=True)
class Steady:
    """A pass that is always exact says so by a class variable; but it forgot `apply`."""

    name: ClassVar[str] = "steady"
    stage: ClassVar[Stage] = "blocks"
    slot: ClassVar[str | None] = None
    exactness: ClassVar[Exactness] = "bitwise"

    def check(self, target: Target) -> Iterable[Finding]:
        """Find nothing."""
        return ()


@dataclass(frozen=True, kw_only=True)
class Whole(Steady):
    """The same, with it."""

    def apply(self, tx: Transaction) -> Change:
        """Do nothing."""
        return Change(0, "things")


def own_passes(pipe: Pipeline) -> None:
    """They go wherever ours do."""
    fluxfire.optimize(pipe, [Sharpen(strength=0.5), Whole(), *presets.fast])
    fluxfire.optimize(pipe, [Steady()])  # type: ignore[list-item]
    check_pass(Sharpen())
    check_pass(Steady())  # type: ignore[arg-type]
    check_pass(Whole(), tiny_kontext, run=edit)
