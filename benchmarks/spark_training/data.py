"""Training data: edits drawn, drawn on and encoded once, then held on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fluxfire.spark import language, noise
from fluxfire.spark.captions import draw_captioned
from fluxfire.spark.edits import KEEP
from fluxfire.spark.rendering import render
from fluxfire.spark.sampling import SEVERAL, draw_edits, kinds_of
from fluxfire.spark.scenes import Dice, Scenes, join, shaken
from spark_training.workers import sixteen_bits

WEIGHTS = {
    "add": 20, "remove": 13, "replace": 16, "recolour": 8, "move": 13, "ground": 16, "look": 8,
    SEVERAL: 12,
}  # fmt: skip
"""How often each kind is drawn, relative to the others: harder ones more often."""
_DRAWN, _ENCODED = 4096, 1024  # pictures at once
_CLIP_LENGTH = 40  # CLIP attends only backwards, so padding beyond the words is never seen


def compile_drawing() -> None:
    """Fuse the functions that draw noise: on a GPU, drawing is then ten times faster."""
    for name in ("smooth", "scattered"):
        setattr(noise, name, torch.compile(getattr(noise, name), dynamic=True))


@dataclass(frozen=True)
class Pool:
    """Encoded edits of one size.

    Attributes:
        grid: (rows, columns) of tokens.
        source: (N, tokens, channels) packed latents of the pictures to edit, or None if these
            are pictures from words alone.
        target: (N, tokens, channels) of one valid result each.
        t5: (N, 32) int64 token ids.
        clip: (N, 40) int64 token ids.
    """

    grid: tuple[int, int]
    source: Tensor | None
    target: Tensor
    t5: Tensor
    clip: Tensor

    def __len__(self) -> int:
        return len(self.target)


class Encoder:
    """Turns scenes and words into what the flow model sees."""

    def __init__(self, parts: dict[str, Any], device: str) -> None:
        self._vae = parts["vae"]
        self._tokenizers = parts["tokenizer"], parts["tokenizer_2"]
        self._device = device

    def text(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Tokenise as the pipeline does: ids for T5 and for CLIP."""
        clip, t5 = (
            torch.tensor(
                tokenizer(
                    prompts, padding="max_length", max_length=length, truncation=True
                ).input_ids,
                device=self._device,
            )
            for tokenizer, length in zip(
                self._tokenizers, (_CLIP_LENGTH, language.LONGEST), strict=True
            )
        )  # fmt: skip
        return t5, clip

    @torch.no_grad()
    def latents(
        self, scenes: Scenes, shorter: int, *, change: Callable[[Tensor], Tensor] = lambda p: p
    ) -> Tensor:
        """Draw and encode: (N, tokens, 4 * channels), as the pipeline packs them.

        Args:
            scenes: N scenes.
            shorter: pixels of the shorter side.
            change: what to do to the pictures, (N, 3, H, W) in [0, 1], before encoding.
        """
        parts = []
        config = self._vae.config
        for first in range(0, len(scenes), _DRAWN):
            some_scenes = scenes.take(slice(first, first + _DRAWN)).to(self._device)
            drawn = change(render(some_scenes, shorter))
            for some in torch.split(drawn, _ENCODED):
                scaled = some.to(self._vae.dtype, memory_format=torch.channels_last) * 2 - 1
                with sixteen_bits(self._device):
                    mean = self._vae.encode(scaled).latent_dist.mode().float()
                parts.append(pack((mean - config.shift_factor) * config.scaling_factor).bfloat16())
        return torch.cat(parts)

    def edits(self, n: int, size: tuple[int, int], dice: Dice) -> Pool:
        """Draw about n edits of the training split."""
        extent, shorter = _extent(size)
        total = sum(WEIGHTS.values())
        sources: list[Scenes] = []
        targets: list[Scenes] = []
        prompts: list[str] = []
        for kind, weight in WEIGHTS.items():
            rounds = 12 if kind == SEVERAL else 1
            for _ in range(rounds):
                edits = kinds_of(kind, dice)
                batch = draw_edits(
                    edits, -(-n * weight // total // rounds), extent, dice, novel=False
                )
                prompts += instructions(batch, dice)
                sources.append(batch.source)
                targets.append(batch.target)
        source = self.latents(join(sources), shorter)
        target = self.latents(shaken(join(targets), dice), shorter)
        t5, clip = self.text(prompts)
        return Pool(_grid(size), source, target, t5, clip)

    def captioned(self, n: int, size: tuple[int, int], dice: Dice) -> Pool:
        """Draw n pictures with captions."""
        extent, shorter = _extent(size)
        scenes, captions = draw_captioned(n, extent, dice)
        t5, clip = self.text([language.phrase(c, dice) for c in captions])
        return Pool(_grid(size), None, self.latents(scenes, shorter), t5, clip)

    def keeping(self) -> tuple[Tensor, Tensor]:
        """Ids of the wordings that ask for no change: T5's and CLIP's."""
        return self.text(list(KEEP))


def instructions(batch: Any, dice: Dice) -> list[str]:
    """Word a batch of edits as in training."""
    wordings = [language.wordings(edit, "train") for edit in batch.edits]
    which = [dice.below(len(some), len(batch)).tolist() for some in wordings]
    return [
        language.phrase(
            batch.instruction(row, tuple(w[k[row]] for w, k in zip(wordings, which, strict=True))),
            dice,
        )
        for row in range(len(batch))
    ]


def pack(latents: Tensor) -> Tensor:
    """Pack patches of two by two: (N, C, H, W) to (N, H/2 * W/2, 4C)."""
    n, c, h, w = latents.shape
    patches = latents.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(n, h // 2 * (w // 2), 4 * c)


def position_ids(grid: tuple[int, int], *, reference: bool, device: str) -> Tensor:
    """Position ids of the image stream: noise tokens, then reference tokens of id 1."""
    rows, columns = (torch.arange(side, device=device, dtype=torch.float32) for side in grid)
    ids = torch.stack(
        [
            torch.zeros(grid, device=device),
            rows[:, None].expand(grid),
            columns[None].expand(grid),
        ],
        -1,
    ).reshape(-1, 3)
    if not reference:
        return ids
    again = ids.clone()
    again[:, 0] = 1
    return torch.cat([ids, again])


def rows(pool: Pool, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield batches of row numbers for ever, every row once before any twice."""
    while True:
        order = torch.randperm(len(pool), generator=generator, device=pool.target.device)
        yield from torch.split(order[: len(pool) // batch * batch], batch)


def _extent(size: tuple[int, int]) -> tuple[tuple[float, float], int]:
    shorter = min(size)
    return (size[0] / shorter, size[1] / shorter), shorter


def _grid(size: tuple[int, int]) -> tuple[int, int]:
    return size[1] // 8, size[0] // 8
