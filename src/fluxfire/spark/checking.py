"""Checks an edit by program: was it made, is it sharp, and is the rest as it was?

An instruction has many valid results, so a picture is not compared with the example's target. The
recogniser says which things, which ground and which light a picture shows, and where. Pixels say
whether everything that the instruction does not name is as in the source.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fluxfire.spark import weights
from fluxfire.spark.edits import SIDES, is_at
from fluxfire.spark.grounds import GROUNDS, centres
from fluxfire.spark.recogniser import SMUDGE, Found, Recogniser, Seen
from fluxfire.spark.rendering import blur, coverage
from fluxfire.spark.scenes import LOOKS, SLOTS, Scenes
from fluxfire.spark.things import NAMES, TINTS, article

BLEMISH = 0.11
"""Largest allowed error of any window of what must stay: the mean over its pixels and channels,
where pixels are in [0, 1]."""
LIKENESS = 0.45
"""Smallest allowed correlation of the fine structure, if light or weather changed."""
SHARPNESS = (0.30, 3.3)
"""Allowed gradient energy of what is new, as a fraction of the target's."""
_WINDOW, _SOFTEN, _FORGIVEN = 8, 1.0, 1  # pixels if the shorter side has 128
_MOVES, _WIDER = (-0.016, -0.012, -0.008, -0.004, 0.0, 0.004, 0.008, 0.012, 0.016), (-0.01, 0, 0.01)
"""Where a camera may be: right or down, and how much wider it sees. See `scenes.SHAKE`."""
_FEWEST = 64  # pixels to compare
_SIDE = 128
_SURE = 0.5
_STRANGE = 0.7  # how sure the recogniser must be of what nobody asked for
_NEAR = 0.16  # how far a replaced or recoloured thing may be from where it was
_STILL = 0.07  # how far one that stays may seem to be from where it was
_DRAWN = 0.62  # half a thing's square with its shadow, as a share of its side
_FAINT = 2e-4


@dataclass(frozen=True)
class Verdict:
    """What the check found.

    Attributes:
        faults: what is wrong, in words; empty if the edit is right.
        blemish: error of the worst window of what must stay; 0 if nothing must.
        likeness: correlation of the fine structure of what must stay in another light; else 1.
        sharpness: gradient energy of what is new, relative to the target's; else 1.
    """

    faults: tuple[str, ...]
    blemish: float
    likeness: float
    sharpness: float

    @property
    def passed(self) -> bool:
        """Whether there is no fault."""
        return not self.faults


@dataclass(frozen=True)
class Task:
    """What an instruction asks, as a program sees it.

    Attributes:
        source: the scene before, as a batch of one; None for text to image.
        target: the scene after, of one valid result.
        side: for each slot, an index into SIDES where an instruction names one, else len(SIDES).
    """

    source: Scenes | None
    target: Scenes
    side: tuple[int, ...]


@cache
def recogniser() -> Recogniser:
    """Return the trained recogniser, on the CPU."""
    net = Recogniser()
    weights.restore({"recogniser": net}, weights.SHIPPED)
    return net.eval().requires_grad_(False)


def as_tensor(image: Any) -> Tensor:
    """Return a picture as (3, height, width) float32 in [0, 1].

    Args:
        image: a PIL image; or an array of (height, width, 3), uint8 or floats in [0, 1]; or
            a tensor of (3, height, width) floats in [0, 1].

    Raises:
        ValueError: the image has another type or shape.
    """
    if isinstance(image, Tensor):
        picture = image.detach().float().cpu()
    else:
        array = np.array(image.convert("RGB") if hasattr(image, "convert") else image)
        scale = 255 if array.dtype == np.uint8 else 1
        picture = torch.from_numpy(array).float().div(scale)
        picture = picture.movedim(-1, 0) if picture.ndim == 3 else picture  # noqa: PLR2004
    if picture.ndim != 3 or picture.shape[0] != 3:  # noqa: PLR2004
        raise ValueError(f"not an RGB picture: its shape is {tuple(picture.shape)}")
    return picture


def judge(image: Tensor, task: Task, source: Tensor | None, target: Tensor) -> Verdict:
    """Check one picture.

    Args:
        image: the picture to check, (3, height, width) in [0, 1].
        task: what the instruction asks.
        source: the picture before the edit, likewise.
        target: one valid result, for its sharpness.
    """
    seen = recogniser().look_at(image[None])[0]
    return _Check(image, task, source, target, seen).verdict()


class _Check:
    """One picture's check."""

    def __init__(
        self, image: Tensor, task: Task, source: Tensor | None, target: Tensor, seen: Seen
    ) -> None:
        self.image, self.source, self.target = image, source, target
        self.before, self.after, self.side = task.source, task.target, task.side
        self.seen = seen
        self.shorter = min(image.shape[1:])
        self.explained: list[Found] = []
        self.changing = torch.zeros(image.shape[1:], dtype=torch.bool)
        self.new_ground = self._differs("ground", "seed")
        self.new_look = self._differs("look", "weather")
        if source is not None:
            same = torch.ones_like(self.changing)
            if self.new_ground:
                same = self._kept_things()
            self.source = steadied(source, image, same)

    def verdict(self) -> Verdict:
        faults = [fault for slot in range(SLOTS) for fault in self._slot(slot)]
        faults += self._whole()
        strange = [f for f in self.seen.found if f not in self.explained and f.sure > _STRANGE]
        faults += [f"there is {_name(f)} that nobody asked for" for f in strange]
        blemish, likeness = self._blemish(), 1.0
        if blemish > BLEMISH:
            faults.append(f"what should stay has changed, by {blemish:.2f}")
        if self.new_look and not self.new_ground:
            likeness = self._likeness()
            if likeness < LIKENESS:
                faults.append(f"what should stay has another structure, likeness {likeness:.2f}")
        sharpness = self._sharpness()
        if not SHARPNESS[0] <= sharpness <= SHARPNESS[1]:
            faults.append(f"what is new is {sharpness:.2f} times as sharp as it should be")
        return Verdict(tuple(faults), blemish, likeness, sharpness)

    def _differs(self, *names: str) -> bool:
        if self.before is None:
            return True
        return any(bool(getattr(self.before, n) != getattr(self.after, n)) for n in names)

    def _slot(self, slot: int) -> Iterator[str]:
        """Check one thing: is it there, or gone, or still there?"""
        before = _thing(self.before, slot) if self.before is not None else None
        after = _thing(self.after, slot)
        if after is not None and before is not None and self._stays(slot):
            yield from self._kept(after)
            return
        if before is not None:
            self._may_change(before)
        found = None
        if after is not None:
            anywhere = before is None or self.side[slot] < len(SIDES)
            found = self._find(after, near=None if anywhere else before)
            if found is None:
                yield f"there is no {NAMES[after.thing]}"
            else:
                self.explained.append(found)
                self._may_change(found)
                yield from self._as_asked(found, after, slot)
        if before is not None and (
            after is None or after.thing != before.thing or self._moved(before, after)
        ):
            yield from self._gone(before, found)

    def _stays(self, slot: int) -> bool:
        """Whether one slot's thing is the same before and after."""
        names = ("thing", "tint", "x", "y", "size", "turn", "flip", "shade")
        return self.before is not None and all(
            bool(getattr(self.before, n)[0, slot] == getattr(self.after, n)[0, slot]) for n in names
        )

    @staticmethod
    def _moved(before: Found, after: Found) -> bool:
        return max(abs(before.x - after.x), abs(before.y - after.y)) > _NEAR

    def _find(self, wanted: Found, near: Found | None) -> Found | None:
        candidates = [f for f in self.seen.found if f.thing == wanted.thing and f.sure > _SURE]
        if near is not None:
            candidates = [f for f in candidates if _apart(f, near) < _NEAR]
        free = [f for f in candidates if f not in self.explained]
        return free[0] if free else None

    def _as_asked(self, found: Found, wanted: Found, slot: int) -> Iterator[str]:
        grey = int(self.after.look) == LOOKS.index("grey")
        if found.tint != wanted.tint and not grey:
            colours = ("its own colour", *TINTS)
            yield f"the {NAMES[wanted.thing]} is {colours[found.tint]}, not {colours[wanted.tint]}"
        side = torch.tensor([self.side[slot]])
        at = torch.tensor([found.x]), torch.tensor([found.y])
        if not bool(is_at(side, *at, self.after.extent)):
            yield f"the {NAMES[wanted.thing]} is not {SIDES[int(side)]}"

    def _kept(self, thing: Found) -> Iterator[str]:
        """Explain a thing that should have stayed; pixels say later whether it did."""
        here = [f for f in self.seen.found if _apart(f, thing) < _NEAR]
        self.explained += here
        still = [f for f in here if f.thing == thing.thing and _apart(f, thing) < _STILL]
        if (self.new_look or self.new_ground) and not still:
            yield f"the {NAMES[thing.thing]} has not stayed"

    def _gone(self, before: Found, found: Found | None) -> Iterator[str]:
        for f in self.seen.found:
            if f is found or f in self.explained:
                continue
            if f.thing == before.thing or (
                _apart(f, before) < before.size / 2 and f.thing == SMUDGE
            ):
                self.explained.append(f)
                yield (
                    f"the {NAMES[before.thing]} is still there"
                    if f.thing == before.thing
                    else (f"there is a trace of the {NAMES[before.thing]}")
                )

    def _whole(self) -> Iterator[str]:
        if self.new_ground:
            ground = int(self.seen.ground.argmax())
            if ground != int(self.after.ground):
                names = (*GROUNDS, "unclear")
                yield f"the ground is {names[ground]}, not {names[int(self.after.ground)]}"
        if self.new_look:
            look = int(self.seen.look.argmax())
            if look != int(self.after.look):
                yield f"the light is {LOOKS[look]}, not {LOOKS[int(self.after.look)]}"

    def _may_change(self, thing: Found) -> None:
        """Let the pixels around a thing differ from the source."""
        height, width = self.changing.shape
        x, y = centres(width, height)
        reach = _DRAWN * thing.size + 0.03
        shift = 0.03  # a shadow lies to the lower right
        across = (x > thing.x - reach) & (x < thing.x + reach + shift)
        along = (y > thing.y - reach) & (y < thing.y + reach + shift)
        self.changing |= (along & across)[0]

    def _blemish(self) -> float:
        """Return the worst window's error of what must have the source's pixels."""
        if self.source is None or self.new_look:
            return 0.0
        staying = ~self.changing
        if self.new_ground:
            staying &= self._kept_things()
        if not staying.any():
            return 0.0
        scale = self.shorter / _SIDE
        pair = blur(torch.stack([self.image, self.source]), _SOFTEN * scale)
        reach = max(1, round(_FORGIVEN * scale))
        error = _forgiving(pair[0], pair[1], reach) * staying
        window = max(2, round(_WINDOW * scale))
        mean = functional.avg_pool2d(error[None, None], window, stride=1)
        share = functional.avg_pool2d(staying.float()[None, None], window, stride=1)
        worst = torch.where(share > 0.25, mean / share.clamp_min(0.25), 0.0)  # noqa: PLR2004
        return float(worst.max())

    def _kept_things(self) -> Tensor:
        """Where things are that stay on a new ground, without their edges."""
        inside = torch.zeros_like(self.changing)
        for slot in range(SLOTS):
            if _thing(self.after, slot) is None or not self._stays(slot):
                continue
            cover = coverage(self.after, slot, self.shorter)[0, 0]
            edge = -functional.max_pool2d(-cover[None, None], 7, 1, 3)[0, 0]
            inside |= edge > 0.95  # noqa: PLR2004
        return inside

    def _likeness(self) -> float:
        """Return the correlation of fine structure with the source, outside of the edit."""
        if self.source is None:
            return 1.0
        fine = [_fine(picture, self.shorter / _SIDE) for picture in (self.image, self.source)]
        a, b = (f[~self.changing] for f in fine)
        if len(a) < _FEWEST:
            return 1.0
        return float(torch.corrcoef(torch.stack([a, b]))[0, 1])

    def _sharpness(self) -> float:
        """Return the gradient energy of what is new."""
        new = self.changing
        if self.new_ground or self.new_look:
            new = torch.ones_like(new)
        if not new.any():
            return 1.0
        found, wanted = (_energy(p)[new].mean() + _FAINT for p in (self.image, self.target))
        return float(found / wanted)


def steadied(source: Tensor, image: Tensor, same: Tensor) -> Tensor:
    """Return the source as the camera of the edit saw it, if that has moved a little.

    The fine structure shows it, whatever the light: of all small moves, take the one at which it
    correlates best with the image's.

    Args:
        source: the picture before the edit, (3, height, width).
        image: the picture after it, likewise.
        same: (height, width) bool, where both should show the same.
    """
    if int(same.sum()) < _FEWEST:
        return source
    shorter = min(source.shape[1:])
    before, after = (_fine(picture, shorter / _SIDE) for picture in (source, image))
    cameras = torch.cartesian_prod(*(torch.tensor(a) for a in (_MOVES, _MOVES, _WIDER)))
    cameras = cameras[cameras.abs().sum(1).argsort(stable=True)]  # equal fits: the smallest move
    seen = _from_cameras(before[None], cameras)[:, 0, same]
    wanted = after[same]
    seen, wanted = seen - seen.mean(1, keepdim=True), wanted - wanted.mean()
    fit = seen @ wanted / (seen.norm(dim=1) * wanted.norm()).clamp_min(1e-6)
    return _from_cameras(source, cameras[fit.argmax()][None])[0]


def _from_cameras(picture: Tensor, cameras: Tensor) -> Tensor:
    """Show a picture of (C, H, W) as N cameras of (N, 3) see it: (N, C, H, W)."""
    height, width = picture.shape[1:]
    shorter = min(height, width)
    right, down, wider = cameras[:, :, None, None].unbind(1)
    x, y = centres(width, height)
    u = (x * 2 * shorter / width - 1) * (1 + wider) + right * 2 * shorter / width
    v = (y * 2 * shorter / height - 1) * (1 + wider) + down * 2 * shorter / height
    size = len(cameras), height, width
    grid = torch.stack([u.expand(size), v.expand(size)], -1)
    pictures = picture.expand(len(cameras), -1, -1, -1)
    return functional.grid_sample(pictures, grid, padding_mode="border", align_corners=False)


def _thing(scenes: Scenes, slot: int) -> Found | None:
    """Return a scene's thing in one slot, as if the recogniser had found it."""
    if not bool(scenes.present[0, slot]):
        return None
    return Found(
        thing=int(scenes.thing[0, slot]),
        tint=int(scenes.tint[0, slot]),
        x=float(scenes.x[0, slot]),
        y=float(scenes.y[0, slot]),
        size=float(scenes.size[0, slot]),
        sure=1.0,
    )


def _apart(a: Found, b: Found) -> float:
    return max(abs(a.x - b.x), abs(a.y - b.y))


def _name(found: Found) -> str:
    return "a smudge" if found.thing == SMUDGE else article(NAMES[found.thing])


def _forgiving(image: Tensor, target: Tensor, reach: int) -> Tensor:
    """Return each pixel's error to the most similar target pixel within reach: (H, W)."""
    height, width = target.shape[1:]
    around = functional.pad(target[None], [reach] * 4, mode="replicate")[0]
    error = torch.full((height, width), torch.inf)
    for dy in range(2 * reach + 1):
        for dx in range(2 * reach + 1):
            moved = around[:, dy : dy + height, dx : dx + width]
            error = torch.minimum(error, (image - moved).square().mean(0))
    return error.sqrt()


def _fine(picture: Tensor, scale: float) -> Tensor:
    """Return the brightness without its slow changes, each place at one strength: (H, W)."""
    grey = picture.mean(0)[None, None]
    fine = blur(grey, 0.8 * scale) - blur(grey, 4 * scale)
    strength = blur(fine.square(), 6 * scale).sqrt()
    return (fine / (strength + 0.01))[0, 0]


def _energy(picture: Tensor) -> Tensor:
    """Return squared gradients summed over channels: (H, W)."""
    padded = functional.pad(picture[None], (0, 1, 0, 1), mode="replicate")[0]
    dx = padded[:, :-1, 1:] - picture
    dy = padded[:, 1:, :-1] - picture
    return (dx**2 + dy**2).sum(0)
