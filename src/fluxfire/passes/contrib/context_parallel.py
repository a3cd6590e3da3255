"""ContextParallel: several processes, each with a GPU, share the tokens of one edit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, dataclass, replace
from importlib import metadata
from typing import Any, ClassVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from fluxfire import modules
from fluxfire.diffusers_types import AttentionModule, Pipeline
from fluxfire.edits.stand_in import own_class
from fluxfire.errors import FluxfireError
from fluxfire.kernels.exchange import Exchange, Shards
from fluxfire.kontext import PlainProcessor
from fluxfire.kontext.attention import ReferenceAttnProcessor, is_flux_processor
from fluxfire.model import Call, Run, Streams
from fluxfire.passes.shared.block_cache import check_for_other_caches
from fluxfire.passes.shared.processes import (
    CONNECT_AGAIN,
    Processes,
    State,
    connected,
    difference,
    digest,
    is_from_a_group,
    message,
)
from fluxfire.protocol import Change, Exactness, Finding, Stage, Target, Trait
from fluxfire.runtime.generation import Generation, Listener
from fluxfire.runtime.transaction import Transaction
from fluxfire.supported import model_of

_KINDS = ("ulysses", "ring")
_SINCE = (0, 36)
"""The first diffusers with context parallelism."""
_START = (
    "start the script with torchrun, and call torch.distributed.init_process_group() first; or use "
    "fluxfire run --gpus"
)


@dataclass(frozen=True)
class ContextParallel:
    """Lets several processes, each with a GPU of its own, compute one edit together.

    Every process runs the same script, with the same pipeline and the same calls, and every process
    gets the whole picture. The blocks run on a part of the text and image tokens in each process.
    Only attention needs the tokens of all. Everything outside the blocks (the text encoders, the
    VAE, the scheduler) runs in every process as before. So this makes the steps faster, and saves
    no memory for weights.

    `"ulysses"` (https://arxiv.org/abs/2309.14509) gives each process all tokens of some heads while
    attention runs. Their number must divide the heads: FLUX has 24. `"ring"` gives each process all
    keys and values. It works with any number of processes and exchanges more from 3 on. Like
    diffusers' ring attention, which has no other method either, it gathers them in one message. It
    needs no merging of partial results, so every attention kernel works.

    Any picture size works. Where the image's tokens do not divide among the processes, the last
    process repeats its last token, and attention leaves the copies out as keys. The text's tokens
    must divide (`max_sequence_length`, 512 by default).

    Passes work on the parts of the tokens, whatever their order in the list: `FusedBlocks`,
    `Float8`, `Attention`, `ModulationTable`, `Compile`, LoRA. `Attention("fa3-fp8")` exchanges
    float8, half the bytes. A cache that skips blocks decides on all tokens, and the processes agree
    on each decision. `ReferenceCache` and `ParaAttention` are refused, and so is an IP-adapter.

    Before each step the processes tell each other where they are, and before the first also a
    digest of what they got. So if one of them ends, raises an exception, is interrupted, or gets
    another prompt, picture, seed, size or number of steps, the others raise a `FluxfireError`
    instead of waiting for it. They see an exception in the middle of a step, or a process that is
    stuck, at the latest after `timeout_seconds`.

    Not measured yet. diffusers' own Ulysses on two H100s with NVLink, with regional compilation,
    took 170.5 ms for a step that takes 281 ms on one. The page "Several GPUs" of the documentation
    has a model on paper for other numbers of GPUs.

    Attributes:
        kind: `"ulysses"` or `"ring"`.
        timeout_seconds: how long a process waits for another one. It must be longer than the
            processes may differ in what they do in a generation, such as to compile.

    Raises:
        ValueError: `kind` is neither of the two, or `timeout_seconds` is not above 0.
        TypeError: `timeout_seconds` is not a number.
    """

    kind: Exchange = "ulysses"
    _: KW_ONLY
    timeout_seconds: float = 120.0

    name: ClassVar[str] = "context-parallel"
    stage: ClassVar[Stage] = "blocks"
    slot: ClassVar[str | None] = "context-parallel"
    exactness: ClassVar[Exactness] = "close"
    provides: ClassVar[frozenset[Trait]] = frozenset({"context-parallel", "wraps-blocks"})

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"kind={self.kind!r}; it must be one of {', '.join(_KINDS)}")
        if isinstance(self.timeout_seconds, bool) or not isinstance(
            self.timeout_seconds, float | int
        ):
            raise TypeError(f"timeout_seconds={self.timeout_seconds!r}; it must be a number")
        if not 0 < self.timeout_seconds < float("inf"):
            raise ValueError(f"timeout_seconds={self.timeout_seconds!r}; it must be above 0")

    def check(self, target: Target) -> Iterator[Finding]:
        """Refuse a single process, heads that do not divide, and what cannot be shared."""
        yield from self._check_processes(target)
        yield from check_for_other_caches(target)
        transformer = target.pipe.transformer
        attentions = model_of(target.pipe).attentions(transformer)
        processors = [attention.processor for attention in attentions]
        if strange := {type(p).__name__ for p in processors if not is_flux_processor(p)}:
            yield Finding(
                "error",
                f"the transformer's attention runs through {', '.join(sorted(strange))}, which "
                f"cannot exchange tokens with other processes",
                "leave ContextParallel out",
            )

    def _check_processes(self, target: Target) -> Iterator[Finding]:
        if not (dist.is_available() and dist.is_initialized()):
            yield Finding("error", "torch.distributed has no initialised process group", _START)
            return
        count = dist.get_world_size()
        if count == 1:
            yield Finding(
                "error", "the process group has this one process only", f"{_START} with 2 or more"
            )
            return
        if _diffusers_version() < _SINCE:
            yield Finding(
                "error",
                f"diffusers {metadata.version('diffusers')} has no context parallelism",
                "install diffusers 0.36 or newer",
            )
        if not dist.is_gloo_available():
            yield Finding("error", "this torch has no gloo, through which the processes agree")
        if target.on_gpu and not dist.is_nccl_available():
            yield Finding("error", "this torch has no NCCL, which connects the GPUs")
        heads = target.pipe.transformer.config.num_attention_heads
        if self.kind == "ulysses" and heads % count:
            yield Finding(
                "error",
                f"{count} processes cannot share {heads} attention heads equally",
                'use a number of processes that divides them, or kind="ring"',
                instead=replace(self, kind="ring"),
            )

    def apply(self, tx: Transaction) -> Change:
        """Connect the processes, and wrap the run through the blocks."""
        from diffusers import ContextParallelConfig, ParallelConfig

        pipe = tx.pipe
        groups = tx.enter(connected(self.timeout_seconds))
        # diffusers and other passes see by it that the transformer is parallel. Nothing reads the
        # degrees: the processors get what they need for each run.
        ulysses, ring = (groups.count if self.kind == kind else 1 for kind in _KINDS)
        config = ParallelConfig(ContextParallelConfig(ulysses_degree=ulysses, ring_degree=ring))
        tx.setattr(pipe.transformer, "_parallel_config", config)
        together = _Together(pipe, self.kind, groups)
        tx.on_undo(together.take_off)
        tx.listen(together)
        tx.wrap_blocks(together.run_blocks, innermost=True)
        tx.report_facts(together.facts)
        blocks = len(model_of(pipe).blocks(pipe.transformer))
        return Change(blocks, f"blocks shared by {groups.count} processes ({self.kind})")


class _Together(Listener):
    """Keeps the processes of a generation together, and shares the tokens among them."""

    def __init__(self, pipe: Pipeline, kind: Exchange, groups: Processes) -> None:
        self._pipe, self._kind, self._groups = pipe, kind, groups
        self._generation: Generation | None = None
        self._parted = False  # whether the processes know that they do not go on together
        self._inputs: dict[str, Any] = {}
        self._attentions: list[AttentionModule] = []
        self._swapped: list[Any] = []
        self._shards: dict[int, Shards] = {}  # by padding; compiled code knows them by identity

    def facts(self) -> dict[str, object]:
        """Report the processes."""
        return {"processes": self._groups.count, "kind": self._kind, "rank": self._groups.rank}

    @override
    @contextmanager
    def on_generation(self, generation: Generation) -> Iterator[None]:
        """Let the processes agree on decisions, and end together.

        Raises:
            FluxfireError: an earlier generation broke the connection.
        """
        groups = self._groups
        if groups.data is None or groups.control is None:
            raise FluxfireError(
                f"the processes lost each other in an earlier generation; {CONNECT_AGAIN}"
            )
        self._generation, self._parted = generation, False
        generation.agree = groups.agree
        try:
            yield
        except BaseException:
            if self._generation is generation:
                with suppress(FluxfireError):  # the user needs the first error
                    self._part(State.FAILED)
            raise
        else:
            self._part(State.END)
        finally:
            if self._generation is generation:
                self._generation, self._inputs, self._attentions = None, {}, []

    @override
    def before_call(self, inputs: dict[str, Any]) -> None:
        """Remember the inputs."""
        self._inputs = inputs

    @override
    @contextmanager
    def on_step(self, call: Call) -> Iterator[None]:
        """Begin a step together, with processors that can exchange tokens.

        Raises:
            FluxfireError: the processes do not compute the same step of the same edit, or this step
                cannot be shared.
        """
        inputs, self._inputs = self._inputs, {}
        # Listed here, because the transformer's blocks are hidden while they run.
        self._attentions = model_of(self._pipe).attentions(self._pipe.transformer)
        self._refuse_step(call, inputs)
        self._compare(self._step_message(call, inputs))
        try:
            self._put_on()
            yield
        except BaseException as error:
            # The others wait in the middle of this step for what this process does not send.
            self._parted = True
            self._groups.close()
            if is_from_a_group(error):
                raise FluxfireError(
                    f"another process stopped in the middle of this step; {CONNECT_AGAIN}"
                ) from error
            raise
        finally:
            self.take_off()

    def run_blocks(self, run: Run, streams: Streams, blocks: range, call: Call) -> Streams:  # noqa: ARG002
        """Run the blocks on this process's tokens, and gather those of all processes."""
        groups, (text, image) = self._groups, (streams.text, streams.image)
        if streams.arguments is not None:
            raise FluxfireError(
                "a pass gives attention more keys and values (ReferenceCache does), which "
                "ContextParallel cannot share"
            )
        padding = self._padding(image.shape[1])
        own_text, own_image = self._own(text), self._own(_pad(image, 1, padding))
        cos, sin = (self._own_rotary(x, text.shape[1], padding) for x in streams.rotary)
        shards = self._shards.setdefault(
            padding, Shards(self._kind, self._group_name(), groups.rank, groups.count, padding)
        )
        own = replace(streams, text=own_text, image=own_image, rotary=(cos, sin))
        processors: list[Any] = [attention.processor for attention in self._attentions]
        try:
            for processor in processors:
                processor.shards = shards
            own = run(own, blocks)
        finally:
            for processor in processors:
                vars(processor).pop("shards", None)
        tokens = own.text.shape[1]
        joint = shards.gather(torch.cat([own.text, own.image], dim=1))
        done_text, done_image = joint[:, :, :tokens], joint[:, :, tokens:]
        return replace(
            own,
            text=done_text.flatten(1, 2),
            image=done_image.flatten(1, 2)[:, : image.shape[1]],
            rotary=streams.rotary,
        )

    def take_off(self) -> None:
        """Give the processors back as they were."""
        swapped, self._swapped = self._swapped, []
        for processor in swapped:
            vars(processor).pop("shards", None)
            processor.__class__ = own_class(processor)

    def _put_on(self) -> None:
        """Turn diffusers' own processors into those that can exchange tokens, for one step."""
        for attention in self._attentions:
            processor: Any = attention.processor
            if type(processor) is PlainProcessor:
                self._swapped.append(processor)
                processor.__class__ = ReferenceAttnProcessor

    def _padding(self, tokens: int) -> int:
        """Return how many copies of the last token make image tokens divide.

        Raises:
            FluxfireError: a process would have nothing but copies.
        """
        count = self._groups.count
        padding = -tokens % count
        if padding >= (tokens + padding) // count:
            raise FluxfireError(
                f"{count} processes cannot share {tokens} image tokens; use fewer processes, or a "
                f"larger picture"
            )
        return padding

    def _refuse_step(self, call: Call, inputs: dict[str, Any]) -> None:
        count, text = self._groups.count, call.tokens.text
        if text % count:
            raise FluxfireError(
                f"{count} processes cannot share {text} text tokens equally; choose a "
                f"max_sequence_length that is a multiple of {count}"
            )
        self._padding(call.tokens.noise + call.tokens.reference)
        for attention in self._attentions:
            if not is_flux_processor(attention.processor):
                raise FluxfireError(
                    f"an attention processor was replaced after ContextParallel was applied, by "
                    f"{type(attention.processor).__name__} (an IP-adapter was loaded?), which "
                    f"cannot exchange tokens; restore(pipe), and optimize(pipe) without it"
                )
        given = {name for name, value in inputs.items() if value is not None}
        arguments = set(inputs.get("joint_attention_kwargs") or ()) - {"scale"}
        residuals = {n for n in given if n.startswith("controlnet") and n.endswith("samples")}
        if unknown := sorted(residuals | arguments):
            raise FluxfireError(
                f"ContextParallel cannot share {', '.join(unknown)} among processes; leave one "
                f"of them out"
            )
        if "native-cache" in modules.cache_traits(self._pipe.transformer):
            raise FluxfireError(
                "diffusers' own cache was enabled after optimize(), and each process would decide "
                "for itself; call pipe.transformer.disable_cache(), or use FirstBlockCache"
            )
        device = inputs["hidden_states"].device.type
        if modules.computes_derivatives() or torch.is_autocast_enabled(device):
            raise FluxfireError(
                "ContextParallel works neither under autocast nor while gradients are on; cast the "
                "pipeline, and call it under torch.no_grad()"
            )

    def _step_message(self, call: Call, inputs: dict[str, Any]) -> Tensor:
        """Return what to say before a step: (numbers,)."""
        generation = self._generation
        if call.step > 0 or generation is None:
            return message(State.STEP, call)
        names = [one.name for one in generation.passes]
        return message(State.STEP, call, digest(names, inputs, self._pipe.scheduler.timesteps))

    def _compare(self, mine: Tensor) -> None:
        """Exchange messages, and raise an error if they differ.

        Raises:
            FluxfireError: they differ. All processes raise it, since all see the same messages.
        """
        try:
            said = self._groups.say(mine)
        except FluxfireError:
            self._parted = True
            raise
        if (why := difference(said)) is not None:
            self._parted = True
            raise FluxfireError(why)

    def _part(self, state: State) -> None:
        """Tell the others that this process leaves the generation.

        Raises:
            FluxfireError: the others did not expect it; not if this process was told to stop.
        """
        if self._parted or self._groups.control is None:
            return
        try:
            self._compare(message(state))
        except FluxfireError:
            if not getattr(self._pipe, "interrupt", False):
                raise

    def _group_name(self) -> str:
        return cast("dist.ProcessGroup", self._groups.data).group_name

    def _own(self, x: Tensor, dim: int = 1) -> Tensor:
        """Return this process's part of a dimension."""
        size = x.shape[dim] // self._groups.count
        return x.narrow(dim, self._groups.rank * size, size).contiguous()

    def _own_rotary(self, x: Tensor, text: int, padding: int) -> Tensor:
        """Return this process's part of (text tokens + image tokens, head width)."""
        return torch.cat([self._own(x[:text], 0), self._own(_pad(x[text:], 0, padding), 0)])


def _pad(x: Tensor, dim: int, padding: int) -> Tensor:
    """Repeat the last entry of a dimension."""
    if not padding:
        return x
    last = x.narrow(dim, x.shape[dim] - 1, 1)
    return torch.cat([x, *[last] * padding], dim=dim)


def _diffusers_version() -> tuple[int, int]:
    major, minor, *_ = metadata.version("diffusers").split(".")
    return int(major), int(minor)
