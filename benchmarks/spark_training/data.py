"""Training data: edits drawn, drawn on and encoded once, then held on the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fluxfire.spark import language
from fluxfire.spark.captions import draw_captioned
from fluxfire.spark.edits import KEEP, KINDS
from fluxfire.spark.rendering import render
from fluxfire.spark.sampling import draw_edits
from fluxfire.spark.scenes import Dice, Scenes

WEIGHTS = {
    "recolour": 8, "remove": 9, "add": 7, "move": 12, "nudge": 10, "grow": 10, "shrink": 9,
    "swap": 18, "ground": 8, "outline": 16, "night": 2, "blur": 2,
}  # fmt: skip
"""How often each kind is drawn, relative to the others: harder ones more often."""
_AT_ONCE = 1024  # pictures drawn and encoded
_CLIP_LENGTH = 40  # CLIP attends only backwards, so padding beyond the words is never seen


@dataclass(frozen=True)
class Pool:
    """Encoded edits of one size.

    Attributes:
        grid: (rows, columns) of tokens.
        source: (N, tokens, channels) packed latents of the pictures to edit, or None if these
            are pictures from words alone.
        target: (N, tokens, channels) of the exact results.
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


def pictures(n: int, size: tuple[int, int], dice: Dice, device: str) -> Tensor:
    """Draw pictures of every kind, edited ones too, to train a VAE on: (n, 3, H, W)."""
    extent, shorter = _extent(size)
    kinds = list(KINDS)
    each = -(-n // len(kinds))
    scenes = [draw_edits(KINDS[k], each, extent, dice).target for k in kinds]
    drawn = torch.cat([render(s.to(device), shorter) for s in scenes])
    return drawn[dice.order(1, len(drawn))[0, :n].to(device)]


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
    def latents(self, scenes: Scenes, shorter: int) -> Tensor:
        """Draw and encode: (N, tokens, 4 · channels), as the pipeline packs them."""
        parts = []
        for first in range(0, len(scenes), _AT_ONCE):
            some = scenes.take(slice(first, first + _AT_ONCE)).to(self._device)
            drawn = render(some, shorter).to(self._vae.dtype) * 2 - 1
            drawn = drawn.to(memory_format=torch.channels_last)
            mean = self._vae.encode(drawn).latent_dist.mode().float()
            config = self._vae.config
            parts.append(pack((mean - config.shift_factor) * config.scaling_factor).bfloat16())
        return torch.cat(parts)

    def edits(self, n: int, size: tuple[int, int], dice: Dice) -> Pool:
        """Draw about n edits of the training split."""
        extent, shorter = _extent(size)
        total = sum(WEIGHTS.values())
        sources, targets, prompts = [], [], []
        for kind, weight in WEIGHTS.items():
            edit, count = KINDS[kind], -(-n * weight // total)
            batch = draw_edits(edit, count, extent, dice, novel=False)
            wordings = language.wordings(edit, "train")
            which = dice.below(len(wordings), count).tolist()
            prompts += [
                language.phrase(batch.instruction(row, wordings[w]), dice)
                for row, w in enumerate(which)
            ]
            sources.append(self.latents(batch.source, shorter))
            targets.append(self.latents(batch.target, shorter))
        t5, clip = self.text(prompts)
        grid = (size[1] // 16, size[0] // 16)
        return Pool(grid, torch.cat(sources), torch.cat(targets), t5, clip)

    def captioned(self, n: int, size: tuple[int, int], dice: Dice) -> Pool:
        """Draw n pictures with captions."""
        extent, shorter = _extent(size)
        scenes, captions = draw_captioned(n, extent, dice)
        t5, clip = self.text([language.phrase(c, dice) for c in captions])
        return Pool((size[1] // 16, size[0] // 16), None, self.latents(scenes, shorter), t5, clip)

    def keeping(self) -> tuple[Tensor, Tensor]:
        """Ids of the wordings that ask for no change: T5's and CLIP's."""
        return self.text(list(KEEP.known))


def pack(latents: Tensor) -> Tensor:
    """Pack patches of two by two: (N, C, H, W) to (N, H/2 · W/2, 4C)."""
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
