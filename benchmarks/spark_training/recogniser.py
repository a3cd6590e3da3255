"""Trains Spark's recogniser: pictures in, what they show out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from fluxfire.spark.noise import Chance
from fluxfire.spark.recogniser import NOTHING, SMUDGE, STRIDE, UNCLEAR, Recogniser
from fluxfire.spark.rendering import blur, render
from fluxfire.spark.scenes import LOOKS, SLOTS, Dice, Scenes, draw, join
from fluxfire.spark.things import THINGS
from spark_training.average import Average, copy, holding
from spark_training.clock import Budget, Clock, Log, rate
from spark_training.workers import sixteen_bits

_PEAK = 1.5e-3
_CORE, _RIM = 0.14, 0.5
_LOOKED = 0.5
_RENEW = 1500
_GHOSTLY, _EACH, _MIXED = 0.15, 0.6, 0.27


def scenes_for(n: int, extent: tuple[float, float], dice: Dice) -> Scenes:
    """Draw orderly scenes, also empty ones, in all looks."""
    scenes = draw(3 * n + 8, extent, dice)
    scenes = scenes.take(scenes.orderly()).take(slice(n))
    n = len(scenes)
    looked = torch.where(dice.uniform(0, 1, n) < _LOOKED, dice.below(len(LOOKS), n), 0)
    empty = dice.uniform(0, 1, n) < 0.05  # noqa: PLR2004
    return scenes.having(look=looked, present=scenes.present & ~empty[:, None])


def spoil(scenes: Scenes, dice: Dice, shorter: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw pictures, some wrong on purpose: (N, 3, H, W), smudged (N, SLOTS), unclear (N,)."""
    n, device = len(scenes), scenes.x.device
    way = dice.uniform(0, 1, n).to(device)
    ghostly = (way < _GHOSTLY)[:, None] & (dice.uniform(0, 1, n, SLOTS) < _EACH).to(device)
    opacity = torch.where(ghostly, dice.uniform(0.2, 0.72, n, SLOTS).to(device), 1.0)
    drawn = render(scenes, shorter, opacity=opacity)
    smudged, unclear = ghostly.clone(), torch.zeros(n, dtype=torch.bool, device=device)
    mixed = ((way >= _GHOSTLY) & (way < _MIXED)).nonzero()[:, 0]
    if len(mixed):
        some = scenes.take(mixed)
        other = some.having(
            thing=(some.thing + dice.below(len(THINGS) - 1, len(mixed), 1).to(device) + 1)
            % len(THINGS),
            seed=some.seed + 1,
        )
        share = dice.uniform(0.3, 0.7, len(mixed), 1, 1, 1).to(device)
        drawn[mixed] = drawn[mixed].lerp(render(other, shorter), share)
        smudged[mixed], unclear[mixed] = True, True
    for low, sigma in ((0.27, 1.8), (0.31, 2.5), (0.35, 4.0)):
        soft = ((way >= low) & (way < low + 0.04)).nonzero()[:, 0]
        if len(soft):
            drawn[soft] = blur(drawn[soft], sigma * shorter / 128)
            smudged[soft], unclear[soft] = True, True
    return drawn, smudged, unclear


def vary(drawn: Tensor, seed: int) -> Tensor:
    """Bend pictures a little, soften some, and add faint noise: as a model's pictures are."""
    n, _, height, width = drawn.shape
    device = drawn.device
    chance = Chance(torch.arange(n, device=device) + seed * 100_003)
    ys, xs = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    x, y = (t[None].expand(n, -1, -1).float() for t in (xs, ys))
    strong = chance.number(0, 1.6)
    bend = [strong * chance.noise(x / 14, y / 14) for _ in range(2)]
    grid = torch.stack(
        [(x + bend[0] + 0.5) * 2 / width - 1, (y + bend[1] + 0.5) * 2 / height - 1], -1
    )
    drawn = functional.grid_sample(drawn, grid, align_corners=False, padding_mode="reflection")
    soft = chance.number(0, 1)[:, None]
    drawn = drawn.lerp(blur(drawn, 0.8), (soft - 0.4).clamp_min(0))
    return (drawn + 0.03 * chance.number(0, 1)[:, None] * torch.randn_like(drawn)).clamp(0, 1)


def labels(scenes: Scenes, smudged: Tensor, size: tuple[int, int]) -> tuple[Tensor, ...]:
    """Say what each cell should answer: things, tints (N, h, w), boxes (N, 3, h, w)."""
    width, height = size
    shorter = min(size)
    n, device = len(scenes), scenes.x.device
    rows = torch.arange(height // STRIDE, device=device)[None, :, None] + 0.5
    columns = torch.arange(width // STRIDE, device=device)[None, None, :] + 0.5
    shape = (n, height // STRIDE, width // STRIDE)
    things = torch.full(shape, NOTHING, device=device)
    tints = torch.full(shape, -100, device=device)
    boxes = torch.zeros(n, 3, *shape[1:], device=device)
    for slot in range(SLOTS):

        def of(name: str, slot: int = slot) -> Tensor:
            value: Tensor = getattr(scenes, name)[:, slot, None, None]
            return value

        dx = of("x") * shorter / STRIDE - columns
        dy = of("y") * shorter / STRIDE - rows
        cells = of("size") * shorter / STRIDE
        far = torch.maximum(dx.abs(), dy.abs())
        core = (far < (_CORE * cells).clamp_min(0.51)) & of("present")
        near = (far < _RIM * cells) & of("present")
        thing = torch.where(smudged[:, slot, None, None], SMUDGE, of("thing"))
        things = torch.where(near & (things == NOTHING), -100, things)
        things = torch.where(core, thing, things)
        clear = core & ~smudged[:, slot, None, None]
        tints = torch.where(clear, of("tint"), torch.where(core, -100, tints))
        box = torch.stack(
            [dx.expand(shape), dy.expand(shape), (cells * STRIDE / 128).log().expand(shape)], 1
        )
        boxes = torch.where(core[:, None], box, boxes)
    return things, tints, boxes


def loss_of(
    net: Recogniser, drawn: Tensor, scenes: Scenes, smudged: Tensor, unclear: Tensor
) -> Tensor:
    """Return the training loss of some pictures."""
    things, tints, boxes, grounds, looks = net(drawn)
    want, want_tint, want_box = labels(scenes, smudged, (drawn.shape[3], drawn.shape[2]))
    core = (want >= 0) & (want != NOTHING)
    each = functional.cross_entropy(things.float(), want, reduction="none", ignore_index=-100)
    weight = torch.where(core, 1.0, 0.1)
    loss = (each * weight).sum() / core.sum().clamp_min(1)
    grey = (scenes.look == LOOKS.index("grey"))[:, None, None]
    want_tint = torch.where(grey, -100, want_tint)
    loss = loss + 0.5 * functional.cross_entropy(tints.float(), want_tint, ignore_index=-100)
    loss = loss + ((boxes.float() - want_box).abs() * core[:, None]).sum() / core.sum().clamp_min(1)
    loss = loss + functional.cross_entropy(
        grounds.float(), torch.where(unclear, UNCLEAR, scenes.ground)
    )
    loss = loss + functional.cross_entropy(looks.float(), scenes.look)
    return torch.as_tensor(loss)


def stock(
    n: int, size: tuple[int, int], dice: Dice, device: str
) -> tuple[Tensor, Scenes, Tensor, Tensor]:
    """Draw a stock of pictures, as uint8, with what they show."""
    shorter = min(size)
    extent = (size[0] / shorter, size[1] / shorter)
    drawn, smudged, unclear, kept = [], [], [], []
    for _ in range(-(-n // 4096)):
        scenes = scenes_for(min(n, 4096), extent, dice).to(device)
        some, smudge, dim = spoil(scenes, dice, shorter)
        drawn.append(some.mul(255).round().byte())
        smudged.append(smudge)
        unclear.append(dim)
        kept.append(scenes)
    return torch.cat(drawn), join(kept), torch.cat(smudged), torch.cat(unclear)


def train_recogniser(
    net: Recogniser, budget: Budget, log: Log, device: str, sizes: tuple[tuple[int, int], ...],
    *, batch: int, n: int | None = None, peak: float = _PEAK, renew: int = _RENEW,
    on_minute: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Train in place until a budget is spent."""
    n = n or (48_000 if device == "cuda" else 120)
    stocks = [
        stock(n if i == 0 else n // 8, size, Dice("see", *size), device)
        for i, size in enumerate(sizes)
    ]
    held = stock(n // 12, sizes[0], Dice("see", "held out"), device)
    net.to(device).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    average = Average(list(net.parameters()))
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=peak, weight_decay=0.02, fused=device == "cuda"
    )
    dice, clock = Dice("see", "order"), Clock(budget)
    for step in clock:
        for group in optimizer.param_groups:
            group["lr"] = peak * rate(clock.spent, step)
        which = (step % 8) if step % 8 < len(sizes) else 0
        drawn, scenes, smudged, unclear = stocks[which]
        rows = dice.below(len(drawn), batch).to(device)
        pictures = vary(drawn[rows].float() / 255, step)
        with sixteen_bits(device):
            loss = loss_of(
                net,
                pictures.to(memory_format=torch.channels_last),
                scenes.take(rows),
                smudged[rows],
                unclear[rows],
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        average.update()
        if step % renew == renew - 1:  # new pictures in place of the old ones
            stocks[0] = stock(n, sizes[0], Dice("see", "again", step), device)
        if step % 250 == 0:
            with holding([net], average.values):
                log.write(
                    part="recogniser",
                    step=step,
                    seconds=clock.seconds,
                    loss=float(loss.detach()),
                    **accuracy(net, held),
                )
                on_minute()
    net.eval()
    copy(average.values, list(net.parameters()))
    log.write(part="recogniser", step=clock.steps, seconds=clock.seconds, **accuracy(net, held))


@torch.no_grad()
def accuracy(net: Recogniser, held: tuple[Tensor, Scenes, Tensor, Tensor]) -> dict[str, float]:
    """Return the shares of right answers on pictures never trained on."""
    drawn, scenes, smudged, unclear = held
    right: dict[str, list[Tensor]] = {
        k: [] for k in ("cores", "nothing", "smudges", "tints", "grounds", "looks")
    }
    for first in range(0, len(drawn), 512):
        part = slice(first, first + 512)
        things, tints, _, grounds, looks = net(drawn[part].float() / 255)
        some = scenes.take(part)
        want, want_tint, _ = labels(some, smudged[part], (drawn.shape[3], drawn.shape[2]))
        answer = things.argmax(1)
        right["cores"].append((answer == want)[(want >= 0) & (want < NOTHING)])
        right["smudges"].append((answer == want)[want == SMUDGE])
        right["nothing"].append((answer == want)[want == NOTHING])
        coloured = (want_tint >= 0) & (some.look != LOOKS.index("grey"))[:, None, None]
        right["tints"].append((tints.argmax(1) == want_tint)[coloured])
        right["grounds"].append(
            grounds.argmax(1) == torch.where(unclear[part], UNCLEAR, some.ground)
        )
        right["looks"].append(looks.argmax(1) == some.look)
    return {name: float(torch.cat(values).float().mean()) for name, values in right.items()}
