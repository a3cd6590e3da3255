"""ModulationTable: every step's modulations, computed before the first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle
from torch import Tensor
from typing_extensions import override

from fluxfire import modules
from fluxfire.edits.stand_in import StandIn
from fluxfire.kontext.modulation import COLUMNS, modulations
from fluxfire.model import Call, Run, Streams
from fluxfire.passes.shared.host_weights import HostWeights
from fluxfire.protocol import Change, Exactness, Finding, Stage, Target, Trait
from fluxfire.runtime.freshness import Watch, heard_by_others
from fluxfire.runtime.generation import Generation, Listener
from fluxfire.runtime.transaction import Transaction
from fluxfire.supported import model_of


@dataclass(frozen=True, kw_only=True)
class ModulationTable:
    """Computes the modulations of all steps in one batched pass, where a generation begins.

    What shifts, scales and gates each block depends on time step, guidance and pooled text alone:
    of FLUX's 11.9 B parameters 3.2 B make nothing else. Plain diffusers reads them at every step
    to multiply one row; here each is read once, for all steps as rows of one product, and the
    steps look theirs up. Embeddings are computed step by step, with the pipeline's own rounding
    of time steps, so they are bitwise the plain ones; the batched product may round otherwise.

    It saves memory, not time, so it is in no preset. Measured on an H100 (docs, "Passes"): a step
    of `faithful` 274 → 276 ms; with `host=True` 274 → 275 ms, and the edit's peak of memory
    33.5 → 27.6 GiB.

    A table holds for one generation and branch (cond and uncond have one each): 2 MB a step and
    sample for FLUX in bfloat16. Where weights change between two steps, it is made anew. A
    generation is computed without where the scheduler's time steps are not those that the pipeline
    goes through, under autocast, and where a LoRA or a hook is on what makes the modulations.

    Attributes:
        host: keep those weights in host memory, pinned, and bring them to the GPU one by one
            where a table is made. This frees 6.0 GiB of FLUX's 22.2; bringing them took the first
            step 0.12 s, on an H100.
    """

    host: bool = False

    name: ClassVar[str] = "modulation-table"
    stage: ClassVar[Stage] = "blocks"
    slot: ClassVar[str | None] = "modulations"
    exactness: ClassVar[Exactness] = "close"
    provides: ClassVar[frozenset[Trait]] = frozenset({"wraps-blocks"})

    def check(self, target: Target) -> Iterator[Finding]:
        """Refuse blocks whose norms are not Flux's, and weights that something else moves."""
        model = model_of(target.pipe)
        strange = {
            type(norm).__name__
            for block in model.blocks(target.pipe.transformer)
            for norm in model.modulated_norms(block)
            if type(norm) not in _TABLED
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
        """Have norms read from what a block is given, and give them their rows."""
        transformer = tx.pipe.transformer
        model = model_of(tx.pipe)
        blocks = model.blocks(transformer)
        norms = [model.modulated_norms(block) for block in blocks]
        for of_block in norms:
            start = 0
            for norm in of_block:
                stop = start + norm.linear.out_features
                tx.set_class(norm, _TABLED[type(norm)])
                tx.setattr(norm, COLUMNS, (start, stop))
                start = stop
        linears = [norm.linear for of_block in norms for norm in of_block]
        freed = 0
        if self.host:
            host = HostWeights()
            tx.on_undo(host.bring_back)
            freed = sum(map(host.take, linears))
            tx.listen(host)
        table = _Table(tx.pipe)
        embed = transformer.time_text_embed
        tx.override(embed, "forward", table.temb)
        tx.listen(table)
        tx.wrap_blocks(table)
        tx.report_facts(table.facts)
        return Change(len(linears), "modulations looked up in a table", -freed, freed)


@dataclass(eq=False)
class _Rows:
    """One branch's table.

    Attributes:
        planned: the scheduler's time steps that it was made of.
        pooled: the pooled text embedding that it was made of.
        temb: one for each step: (batch, width).
        blocks: one for each block: (steps, batch, modulations of its norms).
    """

    planned: Tensor
    pooled: Tensor
    temb: list[Tensor]
    blocks: list[Tensor]


@dataclass(eq=False)
class _Table(Listener):
    """Makes and holds the tables of one generation."""

    pipe: Any
    made: int = 0
    declined: int = 0
    _call: Call | None = None
    _norms: list[list[Any]] = field(default_factory=list)
    _watch: Watch | None = None
    _again: bool = True
    _rows: dict[str, _Rows | None] = field(default_factory=dict)

    @override
    @contextmanager
    def on_generation(self, generation: Generation) -> Iterator[None]:
        """Begin and end without tables."""
        self._watch, self._again = None, generation.calls_back
        self._rows.clear()
        try:
            yield
        finally:
            self._rows.clear()

    @override
    @contextmanager
    def on_step(self, call: Call) -> Iterator[None]:
        """Take note of which call this is, and of the blocks that there are now.

        Blocks may be taken out or put in another order at any time. While they run they cannot be
        seen, so this looks before.
        """
        model = model_of(self.pipe)
        there = model.blocks(self.pipe.transformer)
        norms = [model.modulated_norms(block) for block in there]
        if norms != self._norms:
            self._norms, self._watch = norms, None
        if any(map(_shows_others, there)):
            self._rows.clear()
        elif not torch.is_autocast_enabled(call.timestep.device.type):
            self._call = call
        try:
            yield
        finally:
            self._call = None

    def __call__(self, run: Run, streams: Streams, blocks: range, call: Call) -> Streams:
        """Give each block its row."""
        rows = self._rows.get(call.branch)
        if rows is None:
            return run(streams, blocks)
        tembs = [table[call.step] for table in rows.blocks]
        return replace(run(replace(streams, temb_by_block=tembs), blocks), temb_by_block=None)

    def facts(self) -> dict[str, object]:
        """Tell the report how many tables were made, and how often none fitted."""
        return {"tables": self.made, "without": self.declined}

    def temb(self, embed: Any, timestep: Tensor, *others: Tensor) -> Tensor:
        """Look a step's embedding up, or have it computed; the first of a branch makes a table."""
        call = self._call
        if call is not None and not torch.is_grad_enabled():
            if self._watch is None or (self._again and self._watch.changed()):
                self._rows.clear()
                self._watch = self._watch or Watch(self._layers(), apart_from=(COLUMNS,))
            rows = self._rows.get(call.branch)
            settled = not self._again or self._settled()
            fits = rows and settled and rows.pooled is others[-1]
            if call.branch not in self._rows or (rows and not fits):
                self._rows[call.branch] = self._make(embed, call, timestep, others)
            elif rows and not self._follows(rows.planned, call):
                self._rows[call.branch] = None
                self.declined += 1
            if (rows := self._rows[call.branch]) is not None:
                return rows.temb[call.step]
        made: Tensor = embed(timestep, *others)
        return made

    def _follows(self, planned: Tensor, call: Call) -> bool:
        """Whether a step's time is the very number that was planned: asked without a wait."""
        now = self.pipe.current_timestep
        return call.step < len(planned) and now.data_ptr() == planned[call.step].data_ptr()

    def _layers(self) -> list[Any]:
        """Return the layers whose weights make the table, but for those that offloading moves."""
        makers = [norm for of_block in self._norms for norm in of_block]
        makers.append(self.pipe.transformer.time_text_embed)
        parts = [part for maker in makers for part in maker.modules()]
        return [p for p in parts if not p._modules and not modules.is_hooked(p)]  # noqa: SLF001

    def _settled(self) -> bool:
        """Whether nothing but weights and time decides what the norms compute.

        A LoRA's scale can change from step to step, and a hook wants to hear of every step.
        """
        norms = [norm for of_block in self._norms for norm in of_block]
        if any(not isinstance(norm, _TabledZero | _TabledZeroSingle) for norm in norms):
            return False
        makers = (*norms, self.pipe.transformer.time_text_embed)
        if any(hasattr(part, "lora_A") for maker in makers for part in maker.modules()):
            return False
        return not any(map(heard_by_others, makers))

    def _make(
        self, embed: Any, call: Call, timestep: Tensor, others: tuple[Tensor, ...]
    ) -> _Rows | None:
        planned = self.pipe.scheduler.timesteps[-call.steps :]
        times = self._times(planned, call, timestep) if self._settled() else None
        if times is None:
            self.declined += 1
            return None
        self.made += 1
        temb = [embed(time, *others) for time in times]
        rows = torch.cat(temb)
        blocks = []
        for norms in self._norms:
            parts = [modulations(norm, rows) for norm in norms]
            blocks.append(torch.cat(parts, dim=1).view(len(times), len(temb[0]), -1))
        return _Rows(planned, others[-1], temb, blocks)

    def _times(self, planned: Tensor, call: Call, timestep: Tensor) -> list[Tensor] | None:
        """Return what each step's embedding is asked for, each (batch,); None if unknown.

        The pipeline casts a time step to the latents' dtype and divides it by 1000; the
        transformer casts that to its own and multiplies again. Both round.
        """
        if len(planned) != call.steps or not self._follows(planned, call):
            return None
        times = [
            (t.expand(call.timestep.shape).to(call.timestep) / 1000).to(timestep) * 1000
            for t in planned
        ]
        return times if torch.equal(times[call.step], timestep) else None


class _TabledZero(StandIn, AdaLayerNormZero):  # type: ignore[misc]
    """Six modulations, computed or looked up."""

    def forward(
        self,
        x: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        hidden_dtype: torch.dtype | None = None,
        emb: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Return the modulated norm and the modulations left, as diffusers does."""
        if self.emb is not None or emb is None:  # FLUX's blocks have none of their own
            plain: Any = super().forward
            return plain(x, timestep, class_labels, hidden_dtype, emb)  # type: ignore[no-any-return]
        shift, scale, *rest = modulations(self, emb).chunk(6, dim=1)
        return (self.norm(x) * (1 + scale[:, None]) + shift[:, None], *rest)


class _TabledZeroSingle(StandIn, AdaLayerNormZeroSingle):  # type: ignore[misc]
    """Three modulations, computed or looked up."""

    def forward(self, x: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
        """Return the modulated norm and the gate, as diffusers does."""
        shift, scale, gate = modulations(self, emb).chunk(3, dim=1)
        return self.norm(x) * (1 + scale[:, None]) + shift[:, None], gate


def _shows_others(block: Any) -> bool:
    """Whether somebody sees, and may change, what a block is given: an embedding, not rows."""
    own = vars(block)
    patched = "forward" in own and not {"_hf_hook", "_diffusers_hook"} & own.keys()
    return bool(patched or own["_forward_hooks"] or own["_forward_pre_hooks"])


_TABLED = {AdaLayerNormZero: _TabledZero, AdaLayerNormZeroSingle: _TabledZeroSingle}
