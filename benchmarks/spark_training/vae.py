"""Trains Spark's VAE: pictures in, the same pictures out."""

from __future__ import annotations

from typing import Any

import torch

from fluxfire.spark.scenes import Dice
from fluxfire.spark.scoring import psnr
from fluxfire.spark.tasks import SIZES
from spark_training.average import Average, copy, holding
from spark_training.clock import Budget, Clock, Log, rate
from spark_training.data import pictures

_KL = 1e-4
"""Weight of the divergence to a unit Gaussian, a latent value against a pixel value."""
_PEAK = 2e-3  # of the learning rate


def train_vae(vae: Any, budget: Budget, log: Log, device: str, *, batch: int = 96) -> None:
    """Train a VAE in place until a budget is spent, then set its scale and shift."""
    held = pictures(_stock(device) // 100, SIZES[0], Dice("vae", "held out"), device)
    stock = {size: pictures(_stock(device), size, Dice("vae", *size), device) for size in SIZES}
    vae.to(device=device, memory_format=torch.channels_last).train()
    average = Average(list(vae.parameters()))
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=_PEAK, betas=(0.9, 0.95), weight_decay=1e-3, fused=device == "cuda"
    )
    dice, clock = Dice("vae", "order"), Clock(budget)
    for step in clock:
        for group in optimizer.param_groups:
            group["lr"] = _PEAK * rate(clock.spent, step)
        some = stock[SIZES[step % 8] if step % 8 < len(SIZES) else SIZES[0]]
        drawn = some[dice.below(len(some), batch).to(device)]
        drawn = drawn.to(memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16):
            posterior = vae.encode(drawn * 2 - 1).latent_dist
            again = vae.decode(posterior.sample()).sample
        difference = again.float() - (drawn * 2 - 1)
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        loss = difference.abs().mean() + 2 * difference.square().mean() + _KL * divergence
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update()
        if step % 250 == 0:
            with holding([vae], average.values):
                log.write(
                    part="vae", step=step, seconds=clock.seconds, loss=float(loss.detach()),
                    divergence=float(divergence.detach()), psnr=round_trip(vae, held),
                )  # fmt: skip
    vae.eval()
    copy(average.values, list(vae.parameters()))
    log.write(part="vae", step=clock.steps, seconds=clock.seconds, psnr=round_trip(vae, held))
    _normalise(vae, stock[SIZES[0]][:1024])


@torch.no_grad()
def round_trip(vae: Any, drawn: torch.Tensor) -> float:
    """Return the mean PSNR in dB of pictures encoded and decoded."""
    drawn = drawn.to(vae.dtype)
    again = vae.decode(vae.encode(drawn * 2 - 1).latent_dist.mode()).sample
    again = (again / 2 + 0.5).clamp(0, 1)
    return sum(psnr(a, b) for a, b in zip(again, drawn, strict=True)) / len(drawn)


@torch.no_grad()
def _normalise(vae: Any, drawn: torch.Tensor) -> None:
    """Choose shift and scale so that latents have mean 0 and deviation 1."""
    latents = vae.encode(drawn * 2 - 1).latent_dist.mode()
    vae.register_to_config(
        shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std())
    )


def _stock(device: str) -> int:
    return 12_000 if device == "cuda" else 1_200
