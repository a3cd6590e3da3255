"""ModulationTable: the modulations of all steps, computed at the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

import torch
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle
from torch import Tensor, nn
from typing_extensions import override

from fluxfire import modules
from fluxfire.diffusers_types import Pipeline
from fluxfire.edits.stand_in import StandIn
from fluxfire.kontext.modulation import COLUMNS, ModulatedNorm, modulations
from fluxfire.model import Call, Run, Streams
from fluxfire.passes.shared.adapters import move_adapters_to_weights
from fluxfire.passes.shared.host_weights import HostWeights
from fluxfire.protocol import Change, Exactness, Finding, Stage, Target, Trait
from fluxfire.runtime.freshness import Watch, has_foreign_hooks
from fluxfire.runtime.generation import Generation, Listener
from fluxfire.runtime.transaction import Transaction
from fluxfire.supported import model_of


@dataclass(frozen=True, kw_only=True)
class ModulationTable:
    """Computes the modulations of all steps in one batched pass at the start of a generation.

    A block's shifts, scales and gates depend only on time step, guidance and pooled text. 3.2 B of
    FLUX's 11.9 B parameters compute nothing else. Plain diffusers reads these weights at every step
    to multiply one row. This pass reads them once: it multiplies one row for each step in one
    product, and the steps look up their rows. The embeddings are computed step by step, with the
    pipeline's own rounding of time steps, so they are bitwise the plain ones. The batched product
    may round differently.

    It saves memory, not time, so it is in no preset. Measured on an H100 (docs, "Passes"): a step
    of `faithful` 274 → 276 ms; with `host=True` 274 → 275 ms, and the edit's peak of memory
    33.5 → 27.6 GiB.

    Each generation and branch (cond, uncond) has its own table: 2 MB per step and sample for FLUX
    in bfloat16. If weights change between two steps, the table is computed again. A generation runs
    without a table if the pipeline does not follow the scheduler's time steps, under autocast, and
    if a LoRA or a hook is on the layers that compute the modulations.

    Attributes:
        host: keep these layers' weights in pinned host memory, and copy them to the GPU one by one
            to compute a table. This frees 6.0 GiB of FLUX's 22.2. The copies add 0.12 s to the
            first step, on an H100.
    """

    host: bool = False

    name: ClassVar[str] = "modulation-table"
    stage: ClassVar[Stage] = "blocks"
    slot: ClassVar[str | None] = "modulations"
    exactness: ClassVar[Exactness] = "close"
    provides: ClassVar[frozenset[Trait]] = frozenset({"wraps-blocks"})

    def check(self, target: Target) -> Iterator[Finding]:
        """Refuse blocks whose norms are not Flux's, and offloading together with `host=True`."""
        model = model_of(target.pipe)
        strange = {
            type(norm).__name__
            for block in model.blocks(target.pipe.transformer)
            for norm in model.modulated_norms(block)
            if type(norm) not in _TABLE_NORMS
        }
        if strange:
            yield Finding(
                "error",
                f"the blocks have norms of another kind: {', '.join(sorted(strange))}",
                "leave ModulationTable out",
            )
        if self.host and (moved := target.traits & (modules.SWAPPED | {"model-offload"})):
            yield Finding(
                "error",
                f"ModulationTable(host=True) keeps weights in host memory, and so does "
                f"{', '.join(sorted(moved))}",
                "use one of them",
            )

    def apply(self, tx: Transaction) -> Change:
        """Make the norms read their columns of a table row, and pass the rows to the blocks."""
        transformer = tx.pipe.transformer
        model = model_of(tx.pipe)
        blocks = model.blocks(transformer)
        norms: list[list[ModulatedNorm]] = [model.modulated_norms(block) for block in blocks]
        for of_block in norms:
            start = 0
            if isinstance(of_block[0], _TABLE_CLASSES):
                continue  # one block may stand in two places
            for norm in of_block:
                stop = start + len(norm.linear.weight)
                tx.set_class(norm, _TABLE_NORMS[type(norm)])
                tx.setattr(norm, COLUMNS, (start, stop))
                start = stop
        linears = list(dict.fromkeys(norm.linear for of_block in norms for norm in of_block))
        freed = 0
        if self.host:
            host = HostWeights.of(tx, pin=True)
            freed = sum(map(host.offload, linears))
            move_adapters_to_weights(host.model)
            tx.listen(host)
        tables = _Tables(tx.pipe)
        embed = transformer.time_text_embed
        tx.override(embed, "forward", tables.embed)
        tx.listen(tables)
        tx.wrap_blocks(tables)
        tx.report_facts(tables.facts)
        return Change(len(linears), "modulations looked up in a table", -freed, freed)


@dataclass(eq=False)
class _BranchTable:
    """The modulations of one branch: `"cond"`, or `"uncond"` of true CFG.

    Attributes:
        planned: the scheduler's time steps for which the table was computed.
        times: the time of each step as the embedding gets it: (batch,).
        others: the other inputs of the embedding: guidance, if the model has it, and pooled text.
        temb: the embedding of each step: (batch, width).
        blocks: for each block: (steps, batch, modulations of all its norms).
        versions: torch's counters of in-place changes of `planned` and `pooled`.
    """

    planned: Tensor
    times: list[Tensor]
    others: tuple[Tensor, ...]
    temb: list[Tensor]
    blocks: list[Tensor]
    versions: tuple[int, ...]

    def fits(self, pooled: Tensor) -> bool:
        """Whether the table still holds: nobody wrote to the time steps or the pooled text."""
        return pooled is self.others[-1] and self.versions == _versions(self.planned, pooled)

    def holds(self, step: int, timestep: Tensor, others: tuple[Tensor, ...]) -> bool:
        """Whether the table was computed from these inputs of the embedding. Waits for the device.

        Args:
            step: the denoising step.
            timestep: its time: (batch,).
            others: guidance, if the model has it, and pooled text.
        """
        pairs = zip((self.times[step], *self.others), (timestep, *others), strict=True)
        return all(torch.equal(mine, given) for mine, given in pairs)


def _versions(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(map(modules.change_count, tensors))


@dataclass(eq=False)
class _Tables(Listener):
    """Computes and holds the tables of one generation.

    Attributes:
        pipe: the pipeline.
        made: number of tables computed so far.
        declined: how often a branch ran without a table.
    """

    pipe: Pipeline
    made: int = 0
    declined: int = 0
    _call: Call | None = None
    _norms: list[list[ModulatedNorm]] = field(default_factory=list)  # of each block
    _watch: Watch | None = None
    _watched: list[nn.Module] = field(default_factory=list)
    _may_change: bool = True
    _is_wrapped: bool = False
    _by_branch: dict[str, _BranchTable | None] = field(default_factory=dict)  # None: declined

    @override
    @contextmanager
    def on_generation(self, generation: Generation) -> Iterator[None]:
        """Start and end without tables."""
        self._watch, self._may_change = None, generation.may_change
        tables: dict[str, _BranchTable | None] = {}
        self._by_branch = tables
        try:
            yield
        finally:  # after an interrupt it may come late, when another generation has its own tables
            tables.clear()

    @override
    @contextmanager
    def on_step(self, call: Call) -> Iterator[None]:
        """Remember the call and the current blocks.

        The user may remove or reorder blocks at any time. The transformer hides its blocks while
        they run, so this method lists them before the run.
        """
        model = model_of(self.pipe)
        blocks = model.blocks(self.pipe.transformer)
        norms = [model.modulated_norms(block) for block in blocks]
        if norms != self._norms:
            self._norms, self._watch = norms, None
        # A hook may give the transformer another time or guidance than the pipeline.
        transformer = cast("nn.Module", self.pipe.transformer)
        self._is_wrapped = has_foreign_hooks(transformer, submodules=False)
        if any(map(_is_observed, blocks)):
            self._by_branch.clear()
        elif not torch.is_autocast_enabled(call.timestep.device.type):
            self._call = call
        try:
            yield
        finally:
            if self._call is call:
                self._call = None

    def __call__(self, run: Run, streams: Streams, blocks: range, call: Call) -> Streams:
        """Give each block its row of the table in place of the embedding."""
        table = self._by_branch.get(call.branch)
        if table is None:
            return run(streams, blocks)
        tembs = [of_block[call.step] for of_block in table.blocks]
        return replace(run(replace(streams, temb_by_block=tembs), blocks), temb_by_block=None)

    def facts(self) -> dict[str, object]:
        """Report how many tables were computed, and how often a branch ran without one."""
        return {"tables": self.made, "without": self.declined}

    def embed(
        self, plain_embed: Callable[..., Tensor], timestep: Tensor, *others: Tensor
    ) -> Tensor:
        """Return a step's embedding, from the table or computed.

        The first call of a branch computes its table. This drops a table if weights, norms, pooled
        text or time steps have changed since the table was computed.
        """
        call = self._call
        if call is not None and not modules.computes_derivatives():
            layers = self._layers() if self._may_change or not self._watch else self._watched
            if self._watch is None or layers != self._watched:
                self._by_branch.clear()
                self._watched, self._watch = layers, Watch(layers, apart_from=(COLUMNS,))
            elif self._may_change and self._watch.changed():
                self._by_branch.clear()
                self._watch.accept()
            table = self._by_branch.get(call.branch)
            plain = not self._may_change or self._depends_on_time_alone()
            fits = table and plain and table.fits(others[-1])
            if call.branch not in self._by_branch or (table and not fits):
                self._by_branch[call.branch] = self._compute(plain_embed, call, timestep, others)
            elif table and not (
                self._is_planned_step(table.planned, call)
                and (not self._is_wrapped or table.holds(call.step, timestep, others))
            ):
                self._by_branch[call.branch] = None
                self.declined += 1
            if (table := self._by_branch[call.branch]) is not None:
                return table.temb[call.step]
        computed: Tensor = plain_embed(timestep, *others)
        return computed

    def _is_planned_step(self, planned: Tensor, call: Call) -> bool:
        """Whether the current time step is the scheduler's own tensor for this step.

        Comparing addresses does not wait for the device; comparing numbers would.
        """
        now = self.pipe.current_timestep
        return call.step < len(planned) and now.data_ptr() == planned[call.step].data_ptr()

    def _layers(self) -> list[nn.Module]:
        """Return the layers whose weights determine the table, except offloaded ones."""
        sources = [norm for of_block in self._norms for norm in of_block]
        sources.append(self.pipe.transformer.time_text_embed)
        parts = [part for source in sources for part in source.modules()]
        return [p for p in parts if not p._modules and not modules.is_hooked(p)]  # noqa: SLF001

    def _depends_on_time_alone(self) -> bool:
        """Whether the norms' results depend on weights, time step, guidance and pooled text alone.

        A LoRA's scale can change from step to step, and a hook must be called at every step.
        """
        for of_block in self._norms:
            end = 0  # a row has the modulations in the order in which the norms stand today
            for norm in of_block:
                start, stop = getattr(norm, COLUMNS, (-1, -1))
                if not isinstance(norm, _TABLE_CLASSES) or start != end:
                    return False
                end = stop
        norms = [norm for of_block in self._norms for norm in of_block]
        sources = (*norms, self.pipe.transformer.time_text_embed)
        if any(modules.has_adapter(part) for source in sources for part in source.modules()):
            return False
        return not any(map(has_foreign_hooks, sources))

    def _compute(
        self,
        plain_embed: Callable[..., Tensor],
        call: Call,
        timestep: Tensor,
        others: tuple[Tensor, ...],
    ) -> _BranchTable | None:
        """Compute a branch's table; None if the branch has to run without one."""
        planned = self.pipe.scheduler.timesteps[-call.steps :]
        times = self._times(planned, call, timestep) if self._depends_on_time_alone() else None
        if times is None:
            self.declined += 1
            return None
        self.made += 1
        temb = [plain_embed(time, *others) for time in times]
        rows = torch.cat(temb)
        blocks = []
        for norms in self._norms:
            parts = [modulations(norm, rows) for norm in norms]
            blocks.append(torch.cat(parts, dim=1).view(len(times), len(temb[0]), -1))
        versions = _versions(planned, others[-1])
        return _BranchTable(planned, times, others, temb, blocks, versions)

    def _times(self, planned: Tensor, call: Call, timestep: Tensor) -> list[Tensor] | None:
        """Return the time that each step's embedding will get, (batch,) each; None if unknown.

        The pipeline casts a time step to the latents' dtype and divides it by 1000. The transformer
        casts the result to its own dtype and multiplies by 1000. Both casts round, so this method
        does the same arithmetic. It then compares the result with the current step's time.
        """
        if len(planned) != call.steps or not self._is_planned_step(planned, call):
            return None
        times = [
            (t.expand(call.timestep.shape).to(call.timestep) / 1000).to(timestep) * 1000
            for t in planned
        ]
        return times if torch.equal(times[call.step], timestep) else None


class _TableNormZero(StandIn, AdaLayerNormZero):  # type: ignore[misc]
    """The norm of a double block, with six modulations from a table, or computed."""

    def forward(
        self,
        x: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        hidden_dtype: torch.dtype | None = None,
        emb: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Return the modulated norm, the gate, and the MLP's modulations, as diffusers does."""
        if self.emb is not None or emb is None:  # not a call from one of FLUX's blocks
            plain: Any = super().forward
            return plain(x, timestep, class_labels, hidden_dtype, emb)  # type: ignore[no-any-return]
        shift, scale, *rest = modulations(self, emb).chunk(6, dim=1)
        return (self.norm(x) * (1 + scale[:, None]) + shift[:, None], *rest)


class _TableNormZeroSingle(StandIn, AdaLayerNormZeroSingle):  # type: ignore[misc]
    """The norm of a single block, with three modulations from a table, or computed."""

    def forward(self, x: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
        """Return the modulated norm and the gate, as diffusers does."""
        shift, scale, gate = modulations(self, emb).chunk(3, dim=1)
        return self.norm(x) * (1 + scale[:, None]) + shift[:, None], gate


def _is_observed(block: nn.Module) -> bool:
    """Whether a hook or a replaced forward sees a block's arguments.

    Such code expects the embedding among the arguments, not a row of a table.
    """
    own = vars(block)
    patched = "forward" in own and not {"_hf_hook", "_diffusers_hook"} & own.keys()
    return bool(patched or own["_forward_hooks"] or own["_forward_pre_hooks"])


_TABLE_CLASSES = (_TableNormZero, _TableNormZeroSingle)
_TABLE_NORMS = {
    AdaLayerNormZero: _TableNormZero,
    AdaLayerNormZeroSingle: _TableNormZeroSingle,
}
