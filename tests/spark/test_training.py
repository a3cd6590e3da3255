"""The training code: its arithmetic against independent sums, and a run in small."""

from __future__ import annotations

import json
import runpy
import sys

import pytest
import torch
from diffusers import FluxKontextPipeline
from torch import nn

from fluxfire.errors import LoadError
from fluxfire.spark import drawings, model, score, weights
from fluxfire.spark.edits import KINDS
from fluxfire.spark.rendering import render
from fluxfire.spark.sampling import draw_edits
from fluxfire.spark.scenes import Dice
from fluxfire.spark.scoring import Score, psnr, summarise
from spark_training import __main__ as command
from spark_training import lora
from spark_training.average import Average, Masters, holding
from spark_training.clock import Budget, Clock, Log, rate
from spark_training.data import Encoder, pack, position_ids, rows
from spark_training.flow import Flow
from spark_training.vae import train_vae
from thinned import exhaustive


@pytest.fixture(scope="module")
def parts():
    return model.parts()


def test_latents_and_ids_are_those_of_the_pipeline(parts):
    latents = torch.randn(2, 16, 12, 20)
    expected = FluxKontextPipeline._pack_latents(latents, 2, 16, 12, 20)
    assert torch.equal(pack(latents), expected)
    pipe = FluxKontextPipeline(**parts)
    _, _, noise, reference = pipe.prepare_latents(
        torch.randn(1, 3, 96, 160), 1, 16, 96, 160, torch.float32, torch.device("cpu"),
        torch.Generator().manual_seed(0),
    )  # fmt: skip
    ids = position_ids((6, 10), reference=True, device="cpu")
    assert torch.equal(ids, torch.cat([noise, reference]))
    assert torch.equal(position_ids((6, 10), reference=False, device="cpu"), noise)


def test_words_are_tokenised_as_the_pipeline_does(parts):
    pipe = FluxKontextPipeline(**parts)
    prompts = ["make the red circle blue", "Please remove the star."]
    t5, clip = Encoder(parts, "cpu").text(prompts)
    states, pooled, _ = pipe.encode_prompt(prompts, prompts, max_sequence_length=32)
    assert torch.equal(parts["text_encoder_2"](t5)[0], states)
    assert torch.allclose(parts["text_encoder"](clip).pooler_output, pooled, atol=1e-6)


def test_a_pool_holds_the_encoded_pictures(parts):
    encoder = Encoder(parts, "cpu")
    pool = encoder.edits(24, (160, 96), Dice("pool"))
    assert pool.grid == (6, 10)
    assert pool.source.shape == pool.target.shape == (len(pool), 60, 64)
    batch = draw_edits(KINDS["recolour"], 3, (160 / 96, 1.0), Dice("a"))
    drawn = render(batch.source, 96) * 2 - 1
    latents = parts["vae"].encode(drawn).latent_dist.mode()
    expected = FluxKontextPipeline._pack_latents(latents, 3, 16, 12, 20)
    assert torch.allclose(encoder.latents(batch.source, 96).float(), expected, atol=0.02)


def test_rows_come_once_each_before_any_twice(parts):
    pool = Encoder(parts, "cpu").captioned(20, (128, 128), Dice(0))
    assert pool.source is None
    feed = rows(pool, 5, torch.Generator().manual_seed(0))
    once = torch.cat([next(feed) for _ in range(4)])
    assert sorted(once.tolist()) == list(range(20))


def test_the_loss_is_the_velocitys_mean_squared_error(parts):
    encoder = Encoder(parts, "cpu")
    pool = encoder.edits(12, (64, 64), Dice("loss"))
    flow = Flow(model.parts(), encoder, "cpu")
    seen = {}

    def oracle(grid, mixed, reference, level, *, text):
        assert len(text[0]) == len(mixed)
        seen.update(mixed=mixed, reference=reference, level=level[:, None, None])
        # mixed = (1 - level) target + level noise, so noise - target follows from it.
        return (mixed - pool.target[row].float()) / seen["level"]

    row = torch.arange(8)
    flow._predict = oracle
    assert float(flow.loss(pool, row, keeping=0.0)) < 1e-6
    assert torch.equal(seen["reference"], pool.source[row].float())
    assert float(flow.loss(pool, row, keeping=1.0)) > 1e-3  # other targets: the sources

    def copies(grid, mixed, reference, level, *, text):
        return (mixed - reference) / level[:, None, None]

    flow._predict = copies
    assert float(flow.loss(pool, row, keeping=1.0)) < 1e-6


def test_gradients_reach_every_weight_but_the_unused(parts):
    encoder = Encoder(parts, "cpu")
    pool = encoder.edits(12, (64, 64), Dice("gradients"))
    flow = Flow(model.parts(), encoder, "cpu")
    flow.loss(pool, torch.arange(6), keeping=0.0).backward()
    for module in flow.modules:
        without = [n for n, p in module.named_parameters() if p.grad is None]
        assert without == []


def test_masters_and_averages():
    layer = nn.Linear(3, 2).bfloat16()
    masters = Masters(list(layer.parameters()))
    layer.weight.grad = torch.ones_like(layer.weight)
    masters.take_gradients()
    assert masters.values[0].grad.dtype == torch.float32
    assert layer.weight.grad is None
    assert masters.values[1].grad is None
    masters.values[0].fill_(1 + 2**-12)  # below bfloat16's resolution
    masters.give()
    assert (layer.weight == 1).all()
    average = Average(masters.values, decay=0.5)
    expected = masters.values[0].clone()
    for step, value in enumerate((2.0, 4.0, 8.0), start=1):
        masters.values[0].fill_(value)
        average.update()
        keep = min(0.5, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * value
    assert torch.allclose(average.values[0], expected)
    with holding([layer], average.values):
        assert torch.equal(layer.weight, expected.bfloat16())
    assert (layer.weight == 1).all()


def test_rates_rise_then_fall_and_clocks_resume():
    assert rate(0.0, 0) < rate(0.0, 100) < rate(0.0, 400) == 1
    assert rate(0.5, 10_000) == 0.5
    assert rate(1.0, 10_000) == 0.02
    now = 100.0
    clock = Clock(Budget(1, "minutes"), seconds=45.0, now=lambda: now)
    assert (clock.seconds, clock.spent) == (45, 0.75)
    seen = []
    for step in clock:
        seen.append((step, clock.seconds))
        now += 6
    assert seen == [(0, 45), (1, 51), (2, 57)]
    assert (clock.steps, clock.seconds, clock.spent, clock.over) == (3, 63, 1, True)
    clock = Clock(Budget(8, "steps"), seconds=1e9, steps=5)
    assert [(step, clock.spent) for step in clock] == [(0, 5 / 8), (1, 6 / 8), (2, 7 / 8)]
    assert (clock.steps, clock.spent, clock.over) == (8, 1, True)


def test_weights_survive_the_file_and_misfits_are_refused(tmp_path):
    path = tmp_path / "spark.safetensors"
    parts = model.parts()
    parts["vae"].register_to_config(scaling_factor=0.7, shift_factor=0.1)
    weights.save(parts, path, trained="by a test")
    other = model.parts(seed=1)
    facts = weights.restore(other, path)
    assert facts["trained"] == "by a test"
    assert other["vae"].config.scaling_factor == 0.7
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        for key, tensor in parts[name].state_dict().items():
            assert torch.equal(other[name].state_dict()[key], tensor.half().to(tensor.dtype)), key
    assert path.stat().st_size <= 16 * 2**20
    other["transformer"].proj_out = nn.Linear(3, 3)
    with pytest.raises(LoadError, match="does not fit Spark's transformer"):
        weights.restore(other, path)


def test_scores_are_means_by_kind():
    def scored(kind, passed, db):
        return Score(kind, "", passed, db, 20.0, None)

    found = summarise(
        [scored("move", True, 30), scored("move", False, 20), scored("add", True, 40)]
    )
    assert [(s.kind, s.n, s.success, s.psnr, s.gain) for s in found] == [
        ("move", 2, 0.5, 25, 5),
        ("add", 1, 1.0, 40, 20),
        ("all", 3, pytest.approx(2 / 3), 30, 10),
    ]
    assert psnr(torch.zeros(3, 4, 4), torch.full((3, 4, 4), 0.1)) == pytest.approx(20)


def test_one_loss_is_not_averaged_with_other_sizes():
    with pytest.raises(ValueError, match="several sizes"):
        score(None, [*drawings(n=1), *drawings(n=1, size=(160, 96))])


@exhaustive
@pytest.mark.slow
def test_the_vae_learns(tmp_path, monkeypatch):
    monkeypatch.setattr("spark_training.vae._stock", lambda _: 200)
    vae = model.parts()["vae"]
    log = tmp_path / "log.jsonl"
    train_vae(vae, Budget(40, "steps"), Log(log), "cpu", batch=4)
    first, *_, last = (json.loads(line) for line in log.read_text().splitlines())
    assert last["step"] == 40
    assert last["psnr"] > first["psnr"] + 2
    assert vae.config.scaling_factor != 1
    assert not vae.training


@pytest.mark.slow
def test_training_runs_in_small_and_resumes(tmp_path, parts, monkeypatch):
    weights.save({"vae": parts["vae"]}, tmp_path / "vae.safetensors")  # its training has a test

    def run(*budget):
        """Do as `python -m spark_training` does."""
        small = ["--out", str(tmp_path), "--pool", "60", "--batch", "4", "--score", "2"]
        monkeypatch.setattr(sys, "argv", ["training", *small, *budget])
        monkeypatch.delitem(sys.modules, "spark_training.__main__", raising=False)
        runpy.run_module("spark_training", run_name="__main__")
        return (tmp_path / "spark.safetensors").read_bytes(), (tmp_path / "log.jsonl").read_text()

    def spent():
        return json.loads((tmp_path / "state.json").read_text())

    once, log = run("--steps", "1", "4")
    before = spent()
    assert before["steps"] == 4
    for budget in (("--steps", "1", "4"), ("--minutes", "1", str(before["seconds"] / 61))):
        again, longer = run(*budget)
        assert again == once, "a budget that was spent was spent again"
        assert '"pool"' not in longer.removeprefix(log)
    more, _ = run("--steps", "1", "6")
    assert more != once
    assert spent()["steps"] == 6
    assert spent()["seconds"] > before["seconds"]
    assert (tmp_path / "test.png").is_file()
    assert not list(tmp_path.glob("*.part"))


def test_budgets_are_minutes_unless_steps_are_asked_for(tmp_path, monkeypatch):
    def budgets(*asked):
        seen = []
        monkeypatch.setattr(sys, "argv", ["training", "--out", str(tmp_path), *asked])
        monkeypatch.setattr(command, "_vae", lambda _parts, _path, budget, *_: seen.append(budget))
        monkeypatch.setattr(
            command, "_flow", lambda _parts, _out, budget, *_, **__: seen.append(budget)
        )
        monkeypatch.setattr(command, "_score", lambda *_: None)
        command.main()
        return seen

    assert budgets() == [Budget(4.0, "minutes"), Budget(23.0, "minutes")]
    assert budgets("--minutes", "1", "0.5") == [Budget(1.0, "minutes"), Budget(0.5, "minutes")]
    assert budgets("--steps", "20", "30") == [Budget(20, "steps"), Budget(30, "steps")]
    with pytest.raises(SystemExit):
        budgets("--steps", "20", "30", "--minutes", "1", "1")


@exhaustive
@pytest.mark.slow
@pytest.mark.usefixtures("untrained_weights")
def test_a_lora_is_trained_and_loads(tmp_path, monkeypatch, capsys):
    out = tmp_path / "grey.safetensors"
    arguments = ["lora", "--out", str(out), "--steps", "3", "--pool", "40", "--batch", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    lora.main()
    said = capsys.readouterr().out
    assert said.startswith("3 steps; error to grey: ")
    assert "after" in said
    assert out.stat().st_size <= 2**20
