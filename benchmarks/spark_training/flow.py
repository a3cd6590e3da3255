"""Trains Spark's transformer and text encoders together: a rectified flow.

The model predicts noise minus picture at a noise level. Looking at the reference is the
hard thing to learn, so at first half of each batch asks for no change, and noise-heavy
levels are drawn throughout, where the reference is all there is to go by.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fluxfire.spark.scenes import Dice
from spark_training.average import Average, Masters, parameters
from spark_training.clock import Clock, Log, rate
from spark_training.data import Encoder, Pool, position_ids, rows
from spark_training.muon import Muon
from spark_training.replay import Replay
from spark_training.workers import Workers

TRAINED = ("transformer", "text_encoder", "text_encoder_2")
_PEAK = 1.5e-3  # of the learning rate
_DROPPED = 0.1  # share of instructions replaced by none, so that guidance means something
_KEEPING = (0.5, 0.03)  # share of each batch that asks for no change: at first, and later
_KEEPING_UNTIL = 1500  # steps
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_CHANGED = 3.0
"""Weight of tokens that an edit changes: they are few, and what is hard to draw."""
_MINUTE = 60.0
_SEEN = 0.4
"""Mean squared difference of a changed token's latents, whose variance is 1. The camera's move
alone makes less than 0.4 in 9 of 10 tokens."""
GUIDANCE = (1.0, 5.0)


class Flow:
    """The trained modules in bfloat16, and the loss of one batch."""

    def __init__(self, parts: dict[str, Any], encoder: Encoder, device: str) -> None:
        self.modules: list[nn.Module] = [parts[name].bfloat16() for name in TRAINED]
        self._transformer, self._clip, self._t5 = self.modules
        self._device = device
        self._none = encoder.text([""])
        self._keeping = encoder.keeping()
        self._ids: dict[tuple[tuple[int, int], bool], Tensor] = {}
        self._teacher: list[nn.Module] | None = None

    def compile(self) -> None:
        """Compile the transformer's blocks, for each size anew."""
        for modules in (self.modules, self._teacher or ()):
            for transformer in modules[:1]:
                tr: Any = transformer
                for block in (*tr.transformer_blocks, *tr.single_transformer_blocks):
                    block.compile(dynamic=False)

    def learn_from(self, teacher: list[nn.Module]) -> None:
        """Distil guidance from now on: predict what a teacher predicts under guidance."""
        self._teacher = teacher

    def loss(self, pool: Pool, row: Tensor, keeping: Tensor | float) -> Tensor:
        """Return the mean squared error of the predicted velocities, weighted by token."""
        n = len(row)
        target, t5, clip = pool.target[row].float(), pool.t5[row], pool.clip[row]
        reference = pool.source[row].float() if pool.source is not None else None
        if reference is not None:
            keep = self._random(n) < keeping
            target = torch.where(keep[:, None, None], reference, target)
            which = torch.randint(len(self._keeping[0]), (n,), device=self._device)
            t5 = torch.where(keep[:, None], self._keeping[0][which], t5)
            clip = torch.where(keep[:, None], self._keeping[1][which], clip)
        level = torch.sigmoid(1.2 * torch.randn(n, device=self._device) + 0.7)
        level = level.bfloat16().float()  # what the transformer sees in bfloat16
        noise = torch.randn_like(target)
        mixed = torch.lerp(target, noise, level[:, None, None])
        scale = GUIDANCE[0] + (GUIDANCE[1] - GUIDANCE[0]) * self._random(n)
        scale = scale.bfloat16().float()
        aim = noise - target
        if self._teacher is None:
            drop = self._random(n)[:, None] < _DROPPED
            t5, clip = torch.where(drop, self._none[0], t5), torch.where(drop, self._none[1], clip)
        else:
            with torch.no_grad():
                given = pool.grid, mixed, reference, level, scale
                asked = self._predict(self._teacher, *given, text=(t5, clip)).float()
                none = tuple(t.expand(n, -1) for t in self._none)
                unasked = self._predict(self._teacher, *given, text=none).float()
                aim = unasked + scale[:, None, None] * (asked - unasked)
        predicted = self._predict(
            self.modules, pool.grid, mixed, reference, level, scale, text=(t5, clip)
        )
        error = (predicted.float() - aim).square().mean(-1)
        weight = _weight(target, reference)
        return (error * weight).sum() / weight.sum()

    def backward(self, pool: Pool, row: Tensor, keeping: Tensor | float) -> Tensor:
        """Add the gradients of one batch's loss, and return the loss."""
        with sdpa_kernel(_ATTENTION):
            loss = self.loss(pool, row, keeping)
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _predict(
        self,
        modules: Sequence[nn.Module],
        grid: tuple[int, int],
        mixed: Tensor,
        reference: Tensor | None,
        level: Tensor,
        scale: Tensor,
        *,
        text: tuple[Tensor, ...],
    ) -> Tensor:
        transformer, clip_encoder, t5_encoder = modules
        t5, clip = text
        stream = mixed if reference is None else torch.cat([mixed, reference], 1)
        out: Tensor = transformer(
            hidden_states=stream.bfloat16(),
            timestep=level.bfloat16(),
            guidance=scale.bfloat16(),
            pooled_projections=clip_encoder(clip).pooler_output,
            encoder_hidden_states=t5_encoder(t5).last_hidden_state,
            txt_ids=torch.zeros(t5.shape[1], 3, device=self._device),
            img_ids=self._position_ids(grid, reference is not None),
            return_dict=False,
        )[0]
        return out[:, : mixed.shape[1]]

    def _position_ids(self, grid: tuple[int, int], reference: bool) -> Tensor:
        key = grid, reference
        if key not in self._ids:
            self._ids[key] = position_ids(grid, reference=reference, device=self._device)
        return self._ids[key]

    def _random(self, n: int) -> Tensor:
        return torch.rand(n, device=self._device)


def _weight(target: Tensor, reference: Tensor | None) -> Tensor:
    """Weigh tokens, (batch, tokens): more where an edit changes the picture."""
    if reference is None:
        return torch.ones_like(target[..., 0])
    changed = (target - reference).square().mean(-1) > _SEEN
    return 1 + (_CHANGED - 1) * changed.float()


def hidden(modules: Sequence[nn.Module]) -> list[bool]:
    """Whether each parameter is a matrix inside the transformer's blocks."""
    return [
        i == 0 and "transformer_blocks" in name and p.ndim == 2  # noqa: PLR2004
        for i, module in enumerate(modules)
        for name, p in module.named_parameters()
    ]


def train_flow(
    flow: Flow,
    pools: Sequence[tuple[Pool, int]],
    clock: Clock,
    log: Log,
    workers: Workers,
    *,
    masters: Masters,
    average: Average,
    batch: int = 256,
    peak: float = _PEAK,
    on_minute: Callable[[], None] = lambda: None,
) -> None:
    """Train in place until the clock runs out; the averages hold the result.

    Args:
        flow: what to train.
        pools: data, each with how many of a round's batches it gives.
        clock: the budget.
        log: where the loss goes.
        workers: the processes that train together, each with its own pools.
        masters: the weights in float32, which the optimizers change.
        average: of the masters.
        batch: edits a step and process.
        peak: the highest learning rate.
        on_minute: called every minute, to save.
    """
    device = workers.device
    inner = hidden(flow.modules)
    matrices = [m for m, is_hidden in zip(masters.values, inner, strict=True) if is_hidden]
    others = [m for m, is_hidden in zip(masters.values, inner, strict=True) if not is_hidden]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(
        others, lr=peak, betas=(0.9, 0.98), weight_decay=0.01, fused=device == "cuda"
    )
    generator = torch.Generator(device).manual_seed(clock.steps)
    batches = [min(batch, len(pool)) for pool, _ in pools]
    feeds = [rows(pool, n, generator) for (pool, _), n in zip(pools, batches, strict=True)]
    turns = [i for i, (_, times) in enumerate(pools) for _ in range(times)]
    turns = [turns[i] for i in Dice("turns").order(1, len(turns))[0].tolist()]
    for module in flow.modules:
        module.train()
    learn = _learners(flow, [pool for pool, _ in pools], batches, device)
    log.write(part="ready", seconds=clock.seconds)
    losses, saved = torch.zeros((), device=device), clock.seconds
    for step in clock:
        if clock.seconds - saved > _MINUTE:
            on_minute()
            saved = clock.seconds
        now = peak * rate(clock.spent, step)
        for group in adam.param_groups:
            group["lr"] = now
        which = turns[step % len(turns)]
        early = max(0.0, 1 - clock.steps / _KEEPING_UNTIL)
        keeping = _KEEPING[1] + early * (_KEEPING[0] - _KEEPING[1])
        losses += learn[which](next(feeds[which]), keeping)
        masters.take_gradients()
        workers.average(masters.gradients)
        nn.utils.clip_grad_norm_(masters.values, 1.0)
        muon.step(now)
        adam.step()
        masters.give()
        average.update()
        if (step + 1) % 100 == 0:
            loss = float(losses) / 100
            log.write(part="flow", step=clock.steps, seconds=clock.seconds, loss=loss)
            losses.zero_()
    for module in flow.modules:
        module.eval()
    on_minute()


def _learners(
    flow: Flow, pools: Sequence[Pool], batches: Sequence[int], device: str
) -> list[Callable[[Tensor, float], Tensor]]:
    """Make what turns rows of each pool into gradients: replayed graphs where there is CUDA."""
    if device != "cuda":
        return [functools.partial(flow.backward, pool) for pool in pools]
    weights = parameters(flow.modules)
    made: list[Replay] = []
    for pool, n in zip(pools, batches, strict=True):
        made.append(Replay(flow.backward, weights, pool, n, beside=made[0] if made else None))
    return list(made)
