"""The weights in the package: what they can do, on held-out examples."""

from __future__ import annotations

import socket

import pytest
import torch

from fluxfire import spark
from fluxfire.spark import checking, things, weights
from fluxfire.spark.scoring import psnr, score, summarise
from thinned import exhaustive


@pytest.fixture(scope="module")
def pipe():
    return spark.load(device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def tasks():
    return spark.examples(split="test", n=48, seed=3)


def test_they_load_without_a_network_and_are_small(monkeypatch):
    def offline(*_, **__):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", offline)
    spark.load(device="cpu")
    assert weights.SHIPPED.stat().st_size + things.FILE.stat().st_size <= 40 * 2**20


@pytest.mark.slow
def test_held_out_edits_are_done(pipe, tasks):
    """The model card tells the share of many; of 8, chance alone may take some away."""
    *_, everything = summarise(score(pipe, tasks[:8], batch=8, steps=20))
    assert everything.success >= 0.5


@pytest.mark.slow
def test_one_step_does_not_solve_them(pipe, tasks):
    *_, everything = summarise(score(pipe, tasks[:24], batch=8, steps=1))
    assert everything.success <= 0.25


@exhaustive
@pytest.mark.slow
def test_pictures_are_made_from_words_alone(pipe):
    *_, everything = summarise(score(pipe, spark.drawings(n=16), batch=8))
    assert everything.success >= 0.5


@pytest.mark.slow
@torch.no_grad()
def test_the_vae_keeps_what_the_checker_looks_at(pipe, tasks):
    passed, values = 0, []
    for task in tasks:
        target = checking.as_tensor(task.target)
        latents = pipe.vae.encode(target[None] * 2 - 1).latent_dist.mode()
        again = (pipe.vae.decode(latents).sample[0] / 2 + 0.5).clamp(0, 1)
        passed += task.check(again)
        values.append(psnr(again, target))
    assert passed / len(values) >= 0.9
    assert sum(values) / len(values) >= 30


@pytest.mark.slow
def test_the_words_are_read(pipe):
    """Words for another edit, or none, give another picture, which the check refuses."""
    tasks = spark.examples(split="train", n=3, seed=5, kinds=("recolour", "add", "ground"))
    for number, task in enumerate(tasks):
        foreign = tasks[(number + 1) % len(tasks)].instruction
        pictures = pipe(
            image=[task.source] * 3,
            prompt=[task.instruction, foreign, ""],
            num_inference_steps=10,
            generator=[torch.Generator().manual_seed(number) for _ in range(3)],
        ).images
        first, *others = map(checking.as_tensor, pictures)
        assert max(psnr(first, other) for other in others) < 30
        assert not any(task.check(picture) for picture in pictures[1:])
