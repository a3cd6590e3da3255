"""A small network that says what a picture shows: which things, where, in what colour, and so on.

It was trained apart from the editing model, on pictures of the same program. It knows two answers
that are no thing: nothing, and a smudge. Ghosts, mixtures of two things and blurred things are
smudges, so that a model that averages over many answers does not pass for one that gives an answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fluxfire.spark.grounds import GROUNDS
from fluxfire.spark.scenes import LOOKS
from fluxfire.spark.things import NAMES, TINTS

STRIDE = 8
NOTHING, SMUDGE = len(NAMES), len(NAMES) + 1
UNCLEAR = len(GROUNDS)
"""The ground of blurred or mixed pictures."""
_WIDTHS = (32, 64, 96)
_APART = 0.5
_UNIT = 128.0


class _Residual(nn.Module):
    def __init__(self, width: int, dilation: int = 1) -> None:
        super().__init__()
        self.norm_1 = nn.GroupNorm(8, width)
        self.conv_1 = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation)
        self.norm_2 = nn.GroupNorm(8, width)
        self.conv_2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv_1(functional.silu(self.norm_1(x)))
        out: Tensor = x + self.conv_2(functional.silu(self.norm_2(inner)))
        return out


@dataclass(frozen=True)
class Found:
    """A thing that the recogniser sees.

    Attributes:
        thing: an index into NAMES, or SMUDGE.
        tint: as in `Scenes.tint`.
        x, y: the centre, in fractions of the picture's shorter side.
        size: the side of its square, likewise.
        sure: the probability that it is this thing.
    """

    thing: int
    tint: int
    x: float
    y: float
    size: float
    sure: float


@dataclass(frozen=True)
class Seen:
    """What the recogniser sees in one picture.

    Attributes:
        found: things and smudges, the surest first.
        ground: (GROUNDS + 1,) probabilities; the last is UNCLEAR.
        look: (LOOKS,) probabilities.
    """

    found: tuple[Found, ...]
    ground: Tensor
    look: Tensor


class Recogniser(nn.Module):
    """A convolutional network: pictures in, a map of answers out."""

    def __init__(self) -> None:
        super().__init__()
        a, b, c = _WIDTHS
        self.body = nn.Sequential(
            nn.Conv2d(3, a, 5, stride=2, padding=2),
            _Residual(a),
            nn.Conv2d(a, b, 3, stride=2, padding=1),
            _Residual(b),
            _Residual(b),
            nn.Conv2d(b, c, 3, stride=2, padding=1),
            _Residual(c),
            _Residual(c, 2),
            _Residual(c),
            _Residual(c, 2),
        )
        self.cells = nn.Sequential(
            nn.GroupNorm(8, c), nn.SiLU(), nn.Conv2d(c, len(NAMES) + 2 + len(TINTS) + 1 + 3, 1)
        )
        self.whole = nn.Sequential(
            nn.GroupNorm(8, c), nn.SiLU(), nn.Conv2d(c, c, 3, stride=2, padding=1), nn.SiLU()
        )
        self.answers = nn.Linear(2 * c, len(GROUNDS) + 1 + len(LOOKS))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Look at pictures.

        Args:
            pictures: (N, 3, height, width) in [0, 1], with sides that 8 divides.

        Returns:
            Logits of things (N, THINGS + 2, h, w), logits of tints (N, TINTS + 1, h, w), boxes
            (N, 3, h, w), logits of grounds (N, GROUNDS + 1) and of looks (N, LOOKS). A box is the
            centre's shift from the cell's, in cells, and the logarithm of the size, in units of
            128 pixels.
        """
        inner = self.body(pictures * 2 - 1)
        things, tints, boxes = self.cells(inner).split([len(NAMES) + 2, len(TINTS) + 1, 3], 1)
        whole = self.whole(inner)
        pooled = torch.cat([whole.mean((2, 3)), whole.amax((2, 3))], 1)
        grounds, looks = self.answers(pooled).split([len(GROUNDS) + 1, len(LOOKS)], 1)
        return things, tints, boxes, grounds, looks

    @torch.no_grad()
    def look_at(self, pictures: Tensor) -> list[Seen]:
        """Say what each of (N, 3, height, width) pictures shows."""
        things, tints, boxes, grounds, looks = self(pictures)
        shorter = min(pictures.shape[2:])
        chances = things.softmax(1)
        return [
            Seen(
                tuple(_peaks(chances[i], tints[i], boxes[i], shorter)),
                grounds[i].softmax(0),
                looks[i].softmax(0),
            )
            for i in range(len(pictures))
        ]


def _peaks(chances: Tensor, tints: Tensor, boxes: Tensor, shorter: int) -> list[Found]:
    """Keep the surest cell of each thing."""
    there = 1 - chances[NOTHING]
    candidates = []
    for row, column in (there > 0.5).nonzero().tolist():  # noqa: PLR2004
        sure, thing = torch.cat(
            [chances[:NOTHING, row, column], chances[SMUDGE:, row, column]]
        ).max(0)
        dx, dy, log_size = boxes[:, row, column].tolist()
        candidates.append(
            Found(
                thing=SMUDGE if int(thing) == NOTHING else int(thing),
                tint=int(tints[:, row, column].argmax()),
                x=(column + 0.5 + dx) * STRIDE / shorter,
                y=(row + 0.5 + dy) * STRIDE / shorter,
                size=float(torch.tensor(log_size).exp()) * _UNIT / shorter,
                sure=float(sure),
            )
        )
    kept: list[Found] = []
    for one in sorted(candidates, key=lambda f: -f.sure):
        if all(max(abs(one.x - k.x), abs(one.y - k.y)) > _APART * k.size for k in kept):
            kept.append(one)
    return kept
