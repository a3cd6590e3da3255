"""Trains Spark's VAE: pictures in, the same pictures out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fluxfire.spark.rendering import render
from fluxfire.spark.scenes import Dice
from spark_training.average import Average, copy, holding
from spark_training.clock import Budget, Clock, Log, rate
from spark_training.recogniser import scenes_for
from spark_training.workers import sixteen_bits

_KL = 1e-4
"""Weight of the divergence to a unit Gaussian, a latent value against a pixel value."""
_EDGES = 1.0
"""Weight of the differences between neighbouring pixels, which keep fine texture."""
_PEAK = 2e-3  # of the learning rate


def pictures(n: int, size: tuple[int, int], dice: Dice, device: str) -> Tensor:
    """Draw pictures: (n, 3, H, W) uint8."""
    shorter = min(size)
    extent = (size[0] / shorter, size[1] / shorter)
    drawn = [
        render(scenes_for(min(n, 4096), extent, dice).to(device), shorter).mul(255).round().byte()
        for _ in range(-(-n // 4096))
    ]
    return torch.cat(drawn)[:n]


def train_vae(
    vae: Any,
    budget: Budget,
    log: Log,
    device: str,
    sizes: tuple[tuple[int, int], ...],
    *,
    batch: int,
) -> None:
    """Train a VAE in place until a budget is spent, then set its scale and shift."""
    n = 20_000 if device == "cuda" else 100
    held = pictures(n // 50, sizes[0], Dice("vae", "held out"), device).float() / 255
    stock = {
        size: pictures(n if i == 0 else n // 4, size, Dice("vae", *size), device)
        for i, size in enumerate(sizes)
    }
    vae.to(device=device, memory_format=torch.channels_last).train()
    average = Average(list(vae.parameters()))
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=_PEAK, betas=(0.9, 0.95), weight_decay=1e-3, fused=device == "cuda"
    )
    dice, clock = Dice("vae", "order"), Clock(budget)
    for step in clock:
        for group in optimizer.param_groups:
            group["lr"] = _PEAK * rate(clock.spent, step)
        some = stock[sizes[step % 8] if step % 8 < len(sizes) else sizes[0]]
        drawn = some[dice.below(len(some), batch).to(device)].float() / 127.5 - 1
        drawn = drawn.to(memory_format=torch.channels_last)
        with sixteen_bits(device):
            posterior = vae.encode(drawn).latent_dist
            again = vae.decode(posterior.sample()).sample
        difference = again.float() - drawn
        edges = difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        loss = (
            difference.abs().mean()
            + 2 * difference.square().mean()
            + _EDGES * edges
            + _KL * divergence
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update()
        if step % 250 == 0:
            with holding([vae], average.values):
                log.write(
                    part="vae",
                    step=step,
                    seconds=clock.seconds,
                    loss=float(loss.detach()),
                    divergence=float(divergence.detach()),
                    psnr=round_trip(vae, held),
                )
    vae.eval()
    copy(average.values, list(vae.parameters()))
    log.write(part="vae", step=clock.steps, seconds=clock.seconds, psnr=round_trip(vae, held))
    some = stock[sizes[0]][:1024]
    with torch.no_grad():
        latents = torch.cat(
            [
                vae.encode(part.float() / 127.5 - 1).latent_dist.mode()
                for part in torch.split(some, 256)
            ]
        )
    vae.register_to_config(
        shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std())
    )
    log.write(part="vae", channels=str([round(float(s), 3) for s in latents.std((0, 2, 3))]))


@torch.no_grad()
def round_trip(vae: Any, drawn: torch.Tensor) -> float:
    """Return the mean PSNR in dB of pictures encoded and decoded."""
    values = []
    for some in torch.split(drawn, 200):
        again = vae.decode(vae.encode(some * 2 - 1).latent_dist.mode()).sample
        error = ((again / 2 + 0.5).clamp(0, 1) - some).square().mean((1, 2, 3))
        values.append(-10 * error.log10())
    return float(torch.cat(values).mean())
