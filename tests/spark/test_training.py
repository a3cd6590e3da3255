"""The training code: its arithmetic against independent sums, and a run in small."""

from __future__ import annotations

import copy
import json
import runpy
import sys
from dataclasses import replace

import pytest
import torch
from diffusers import FluxKontextPipeline
from safetensors import safe_open
from torch import nn

from fluxfire.spark import language, model, weights
from fluxfire.spark.captions import draw_captioned
from fluxfire.spark.edits import KEEP, KINDS
from fluxfire.spark.recogniser import Recogniser
from fluxfire.spark.rendering import render
from fluxfire.spark.sampling import draw_edits
from fluxfire.spark.scenes import Dice
from spark_training import __main__ as command
from spark_training import workers as processes
from spark_training.average import Average, Masters, holding, parameters
from spark_training.clock import Budget, Clock, Log, rate
from spark_training.data import Encoder, instructions, pack, position_ids, rows
from spark_training.flow import GUIDANCE, TRAINED, Flow, hidden, train_flow
from spark_training.muon import Muon
from spark_training.recogniser import accuracy, train_recogniser
from spark_training.vae import round_trip, train_vae
from spark_training.workers import Workers
from thinned import exhaustive

ALONE = Workers(0, 1, "cpu")
SMALL = (32, 32)


@pytest.fixture(scope="module")
def parts():
    return model.parts()


@pytest.fixture(scope="module")
def encoder(parts):
    return Encoder(parts, "cpu")


@pytest.fixture(scope="module")
def pool(encoder):
    return encoder.edits(24, SMALL, Dice("pool"))


def polar(gradient, given):
    """An update in the basis of a gradient's singular vectors, by an SVD in float64."""
    u, _, vh = torch.linalg.svd(gradient.double(), full_matrices=False)
    return u.mT @ given.double() @ vh.mT


def gradient(rows, columns, seed):
    """A matrix with singular values between 0.3 and 1."""
    random = torch.Generator().manual_seed(seed)
    k = min(rows, columns)
    left, right = (
        torch.linalg.qr(torch.randn(n, k, generator=random, dtype=torch.float64)).Q
        for n in (rows, columns)
    )
    return (left * torch.linspace(0.3, 1, k, dtype=torch.float64) @ right.mT).float()


def muon_step(muon, matrices, gradients, rate=0.01):
    """Do a step, and return what it subtracted, without rate and scale."""
    before = [m.clone() for m in matrices]
    for matrix, g in zip(matrices, gradients, strict=True):
        matrix.grad = g
    muon.step(rate)
    return [
        (b - m) / (rate * 0.2 * max(m.shape) ** 0.5) for b, m in zip(before, matrices, strict=True)
    ]


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)], ids=str)
def test_muon_makes_singular_values_one_and_keeps_the_vectors(shape):
    gradients = [gradient(*shape, seed) for seed in (1, 2)]
    matrices = [torch.zeros(shape) for _ in gradients]
    for g, update in zip(gradients, muon_step(Muon(matrices), matrices, gradients), strict=True):
        values = torch.linalg.svdvals(update.double())
        assert values.min() > 0.6
        assert values.max() < 1.3
        inner = polar(g, update)
        assert inner.diagonal().min() > 0.6
        assert (inner - torch.diag(inner.diagonal())).abs().max() < 0.06


def test_muon_looks_ahead_along_its_momentum():
    first, second = gradient(20, 32, 3), gradient(20, 32, 4)
    matrix = torch.zeros(20, 32)
    muon = Muon([matrix], momentum=0.9)
    muon_step(muon, [matrix], [first])
    (update,) = muon_step(muon, [matrix], [second])
    moment = 0.9 * (0.1 * first) + 0.1 * second
    expected = 0.1 * second + 0.9 * moment

    def off(direction):
        inner = polar(direction, update)
        return float((inner - torch.diag(inner.diagonal())).norm() / inner.norm())

    assert off(expected) < 0.1
    assert off(second) > 0.15
    assert off(moment) > 0.15 or off(expected) < off(moment)


def test_muon_decays_and_does_not_move_without_gradients():
    matrix = torch.ones(4, 6)
    matrix.grad = torch.zeros(4, 6)
    Muon([matrix], decay=0.5).step(0.1)
    assert torch.allclose(matrix, torch.full((4, 6), 0.95))


def test_muon_keeps_matrices_of_several_shapes_apart():
    shapes = [(8, 4), (4, 8), (8, 4), (6, 6)]
    gradients = [gradient(*shape, i) for i, shape in enumerate(shapes)]
    matrices = [torch.zeros(shape) for shape in shapes]
    updates = muon_step(Muon(matrices), matrices, gradients)
    for g, update in zip(gradients, updates, strict=True):
        assert polar(g, update).diagonal().min() > 0.6


def test_only_matrices_inside_of_blocks_are_muons(parts):
    modules = [parts[name] for name in TRAINED]
    chosen = hidden(modules)
    named = [(n, k, p) for n in TRAINED for k, p in parts[n].named_parameters()]
    assert len(chosen) == len(named) == len(parameters(modules))
    for is_hidden, (module, key, p) in zip(chosen, named, strict=True):
        inside = module == "transformer" and key.split(".")[0].endswith("transformer_blocks")
        assert is_hidden == (inside and p.dim() == 2), key
    assert sum(p.numel() for h, (*_, p) in zip(chosen, named, strict=True) if h) > 5e6


def test_latents_and_ids_are_those_of_the_pipeline(parts):
    latents = torch.randn(2, 8, 12, 20)
    expected = FluxKontextPipeline._pack_latents(latents, 2, 8, 12, 20)
    assert torch.equal(pack(latents), expected)
    pipe = FluxKontextPipeline(**parts)
    _, _, noise, reference = pipe.prepare_latents(
        torch.randn(1, 3, 96, 160), 1, 8, 96, 160, torch.float32, torch.device("cpu"),
        torch.Generator().manual_seed(0),
    )  # fmt: skip
    ids = position_ids((12, 20), reference=True, device="cpu")
    assert torch.equal(ids, torch.cat([noise, reference]))
    assert torch.equal(position_ids((12, 20), reference=False, device="cpu"), noise)


def test_words_are_tokenised_as_the_pipeline_does(parts, encoder):
    pipe = FluxKontextPipeline(**parts)
    prompts = ["make the dog blue", "Please remove the star."]
    t5, clip = encoder.text(prompts)
    states, pooled, _ = pipe.encode_prompt(prompts, prompts, max_sequence_length=language.LONGEST)
    assert torch.equal(parts["text_encoder_2"](t5)[0], states)
    assert torch.allclose(parts["text_encoder"](clip).pooler_output, pooled, atol=1e-6)


def test_a_pool_holds_the_encoded_pictures(parts, encoder):
    pool = encoder.edits(24, (48, 32), Dice("pool"))
    assert pool.grid == (4, 6)
    assert pool.source.shape == pool.target.shape == (len(pool), 24, 32)
    assert pool.t5.shape == (len(pool), 32)
    assert pool.clip.shape == (len(pool), 40)
    assert not torch.equal(pool.source, pool.target)
    batch = draw_edits((KINDS["recolour"],), 3, (1.5, 1.0), Dice("a"))
    drawn = render(batch.source, 32) * 2 - 1
    vae = model.parts()["vae"]
    vae.register_to_config(shift_factor=0.1, scaling_factor=2.0)
    scaled = (vae.encode(drawn).latent_dist.mode() - 0.1) * 2
    expected = FluxKontextPipeline._pack_latents(scaled, 3, 8, 8, 12)
    found = Encoder({**parts, "vae": vae}, "cpu").latents(batch.source, 32).float()
    assert torch.allclose(found, expected, atol=0.05)


def test_instructions_of_training_are_in_known_wordings():
    batch = draw_edits((KINDS["remove"],), 40, (1.0, 1.0), Dice("words"))
    said = instructions(batch, Dice("say"))
    assert len(said) == 40
    for row, text in enumerate(said):
        plain = text.lower().rstrip(".").removeprefix("please ").removesuffix(" please")
        assert plain in {batch.instruction(row, (w,)) for w in KINDS["remove"].known}
    assert len({text.split()[0].lower() for text in said}) > 4


def test_a_pool_from_words_has_no_source(encoder):
    pool = encoder.captioned(6, SMALL, Dice(0))
    assert pool.source is None
    assert pool.target.shape == (6, 16, 32)
    scenes, _ = draw_captioned(6, (1.0, 1.0), Dice(0))
    assert torch.equal(pool.target, encoder.latents(scenes, 32))


def test_rows_come_once_each_before_any_twice(encoder):
    pool = encoder.captioned(20, SMALL, Dice(0))
    feed = rows(pool, 5, torch.Generator().manual_seed(0))
    for _ in range(2):
        once = torch.cat([next(feed) for _ in range(4)])
        assert sorted(once.tolist()) == list(range(20))


@pytest.fixture
def flow(encoder):
    return Flow(model.parts(), encoder, "cpu")


def changed_weight(target, source):
    """Three for tokens that an edit changes, else one: in float64."""
    apart = (target.double() - source.double()).pow(2).mean(-1)
    return 1 + 2 * (apart > 0.4).double()


def noise_less_target(mixed, target, level):
    # mixed = (1 - level) target + level noise, so noise - target follows from it.
    return (mixed - target) / level[:, None, None]


def half_changed(pool):
    """The pool, where each edit changes every second token and no other."""
    target = pool.source.clone()
    target[:, ::2] += 1
    return replace(pool, target=target)


def test_the_loss_is_the_velocitys_weighted_error(flow, pool):
    pool, row, seen = half_changed(pool), torch.arange(16), {}
    slip = 0.3 * torch.randn(16, *pool.target.shape[1:])

    def oracle(modules, *given, text):
        grid, mixed, reference, level, scale = given
        assert modules is flow.modules
        assert grid == pool.grid
        seen.update(reference=reference, level=level, scale=scale, text=text, mixed=mixed)
        return noise_less_target(mixed, pool.target[row].float(), level) + slip

    flow._predict = oracle
    found = float(flow.loss(pool, row, keeping=0.0))
    weight = changed_weight(pool.target[row], pool.source[row])
    assert 1 < float(weight.mean()) < 3
    expected = (slip.double().pow(2).mean(-1) * weight).sum() / weight.sum()
    assert found == pytest.approx(float(expected), rel=1e-3)
    assert torch.equal(seen["reference"], pool.source[row].float())
    assert ((seen["level"] > 0) & (seen["level"] < 1)).all()
    assert ((seen["scale"] >= GUIDANCE[0]) & (seen["scale"] <= GUIDANCE[1])).all()
    assert torch.equal(seen["level"], seen["level"].bfloat16().float())


def test_a_kept_batch_asks_for_its_source(flow, pool, encoder):
    row, asked = torch.arange(16), []

    def copies(modules, *given, text):
        _, mixed, reference, level, _ = given
        asked.extend(text[0].tolist())
        return noise_less_target(mixed, reference, level)

    flow._predict = copies
    assert float(flow.loss(pool, row, keeping=1.0)) < 1e-5
    wordings = encoder.text([*KEEP, ""])[0].tolist()
    assert all(ids in wordings for ids in asked)
    assert float(flow.loss(pool, row, keeping=0.0)) > 1e-3


def test_a_tenth_of_the_instructions_is_dropped(flow, pool, encoder):
    (nothing,) = encoder.text([""])[0].tolist()
    dropped = []

    def looks(modules, *given, text):
        _, mixed, *_ = given
        dropped.extend(ids == nothing for ids in text[0].tolist())
        return mixed

    flow._predict = looks
    for _ in range(60):
        flow.loss(pool, torch.arange(len(pool)), keeping=0.0)
    assert 0.06 < sum(dropped) / len(dropped) < 0.14


def test_pictures_from_words_weigh_alike(flow, encoder):
    pool = encoder.captioned(8, SMALL, Dice(0))
    slip = torch.randn(8, *pool.target.shape[1:])

    def oracle(modules, *given, text):
        _, mixed, reference, level, _ = given
        assert reference is None
        return noise_less_target(mixed, pool.target.float(), level) + slip

    flow._predict = oracle
    found = float(flow.loss(pool, torch.arange(8), keeping=1.0))
    assert found == pytest.approx(float(slip.pow(2).mean()), rel=1e-3)


def test_distillation_aims_at_the_teacher_under_guidance(flow, pool, encoder):
    pool, row = half_changed(pool), torch.arange(12)
    shape = (12, *pool.target.shape[1:])
    asked, unasked, own = (torch.randn(shape) for _ in range(3))
    nothing = [t.expand(12, -1) for t in encoder.text([""])]
    words, teacher, calls = (pool.t5[row], pool.clip[row]), [], []

    def predict(modules, *given, text):
        _, mixed, reference, level, scale = given
        without = all(torch.equal(a, b) for a, b in zip(text, nothing, strict=True))
        assert without or all(torch.equal(a, b) for a, b in zip(text, words, strict=True))
        calls.append((modules is teacher, without, mixed, reference, level, scale))
        return own if modules is flow.modules else unasked if without else asked

    flow._predict = predict
    flow.learn_from(teacher)
    found = float(flow.loss(pool, row, keeping=0.0))
    assert sorted(c[:2] for c in calls) == [(False, False), (True, False), (True, True)]
    for call in calls[1:]:  # all see the same noise, at the same level, under the same guidance
        assert all(torch.equal(a, b) for a, b in zip(call[2:], calls[0][2:], strict=True))
    scale = calls[0][5].double()[:, None, None]
    assert scale.min() >= 1
    assert scale.max() <= 5
    assert scale.std() > 0.5
    aim = unasked.double() + scale * (asked.double() - unasked.double())
    weight = changed_weight(pool.target[row], pool.source[row])
    expected = ((own.double() - aim).pow(2).mean(-1) * weight).sum() / weight.sum()
    assert found == pytest.approx(float(expected), rel=1e-4)


def test_gradients_reach_the_student_and_no_teacher(flow, pool):
    teacher = [model.parts(seed=1)[name].bfloat16() for name in TRAINED]
    flow.learn_from(teacher)
    flow.backward(pool, torch.arange(4), 0.0)
    for module in flow.modules:
        assert [n for n, p in module.named_parameters() if p.grad is None] == []
    assert all(p.grad is None for module in teacher for p in module.parameters())


def test_masters_hold_what_bfloat16_loses():
    layer = nn.Linear(3, 2).bfloat16()
    masters = Masters(list(layer.parameters()))
    layer.weight.grad = torch.full_like(layer.weight, 2.0)
    layer.bias.grad = torch.full_like(layer.bias, 3.0)
    masters.take_gradients()
    assert masters.values[0].grad.dtype == torch.float32
    assert masters.gradients.tolist() == [2.0] * 6 + [3.0] * 2
    masters.gradients /= 2  # as the average over processes does
    assert (masters.values[1].grad == 1.5).all()
    assert layer.weight.grad is None
    assert layer.bias.grad is None
    masters.values[0].fill_(1 + 2**-12)  # below bfloat16's resolution
    masters.give()
    assert (layer.weight == 1).all()
    assert (masters.values[0] > 1).all()


def test_averages_by_arithmetic():
    layer = nn.Linear(3, 2)
    masters = Masters(list(layer.parameters()))
    average = Average(masters.values, decay=0.5)
    expected = masters.values[0].double()
    for step, value in enumerate((2.0, 4.0, 8.0), start=1):
        masters.values[0].fill_(value)
        average.update()
        keep = min(0.5, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * value
    assert torch.allclose(average.values[0].double(), expected)
    own = layer.weight.clone()
    with holding([layer], average.values):
        assert torch.equal(layer.weight, average.values[0])
    assert torch.equal(layer.weight, own)
    start = [torch.zeros_like(v) for v in masters.values]
    going_on = Average(masters.values, decay=0.9, start=start)
    masters.values[0].fill_(1.0)
    going_on.update()  # an average that goes on does not start afresh
    assert torch.allclose(going_on.values[0], torch.full((2, 3), 0.1))


def test_rates_rise_then_stay_then_fall():
    assert rate(0.0, 0) < rate(0.0, 100) < rate(0.0, 199) == 1
    assert rate(0.5, 10_000) == 1
    assert rate(0.775, 10_000) == pytest.approx(0.5)
    assert rate(1.0, 10_000) == 0.01
    assert rate(0.775, 99) == pytest.approx(0.25)
    assert rate(0.0, 4, warmup=10) == 0.5


def ticking(step):
    """A clock whose time goes on by hand."""
    now = [100.0]

    def tick():
        now[0] += step

    return (lambda: now[0]), tick


def test_clocks_of_minutes_look_up_now_and_then_and_resume():
    now, tick = ticking(1.0)
    clock = Clock(Budget(1, "minutes"), seconds=45.0, now=now)
    assert (clock.seconds, clock.spent, clock.over) == (45, 0.75, False)
    taken = []
    for step in clock:
        taken.append(step)
        tick()
    assert taken == list(range(20))  # it looks every ten steps, and 15 seconds were left
    assert (clock.steps, clock.seconds, clock.spent, clock.over) == (20, 65, 1, True)


def test_clocks_of_steps_resume_exactly():
    clock = Clock(Budget(8, "steps"), seconds=1e9, steps=5)
    assert [(step, clock.spent) for step in clock] == [(0, 5 / 8), (1, 6 / 8), (2, 7 / 8)]
    assert (clock.steps, clock.spent, clock.over) == (8, 1, True)
    assert Clock(Budget(8, "steps"), steps=8).over
    assert list(Clock(Budget(8, "steps"), steps=8)) == []


def test_a_sitting_stops_although_something_is_left():
    now, tick = ticking(1.0)
    clock = Clock(Budget(1, "minutes"), now=now, stop=100 + 12)
    for _ in clock:
        tick()
    assert clock.steps == 20
    assert clock.over
    assert clock.spent == pytest.approx(20 / 60)
    steps = Clock(Budget(50, "steps"), now=now, stop=now() + 3)
    for _ in steps:
        tick()
    assert (steps.steps, steps.spent, steps.over) == (3, 3 / 50, True)
    assert Clock(Budget(9, "steps"), now=now, stop=now()).over
    again = Clock(Budget(50, "steps"), steps=3, now=now)
    assert not again.over
    assert again.spent == 3 / 50


def test_all_processes_read_the_first_ones_clock():
    clock = Clock(Budget(10, "steps"), agree=lambda _: 0.5)
    assert (clock.spent, clock.over) == (0.5, False)
    clock = Clock(Budget(10, "steps"), agree=lambda _: 2.0)
    assert clock.over


def test_logs_are_lines_of_json(tmp_path, capsys):
    log = Log(tmp_path / "log.jsonl")
    log.write(part="a", loss=1 / 3)
    log.write(part="b")
    Log(tmp_path / "silent.jsonl", silent=True).write(part="c")
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"part": "a", "loss": 0.33333}, {"part": "b"}]
    assert capsys.readouterr().out.splitlines() == lines
    assert not (tmp_path / "silent.jsonl").exists()


def test_a_worker_alone_agrees_with_itself(monkeypatch):
    values = torch.tensor([1.0, 2.0])
    ALONE.average(values)
    assert values.tolist() == [1.0, 2.0]
    assert ALONE.agree(0.1) == 0.1
    assert ALONE.first
    assert not Workers(1, 2, "cpu").first
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert processes.join() == ALONE


def test_training_moves_every_weight_and_keeps_their_average(flow, pool, tmp_path):
    torch.manual_seed(0)
    masters = Masters(parameters(flow.modules))
    average = Average(masters.values)
    start, saved = [v.clone() for v in masters.values], []
    clock = Clock(Budget(2, "steps"))
    train_flow(
        flow, [(pool, 1)], clock, Log(tmp_path / "log.jsonl"), ALONE, masters=masters,
        average=average, batch=4, peak=1e-2, on_minute=lambda: saved.append(clock.steps),
    )  # fmt: skip
    assert clock.steps == 2
    assert saved[-1] == 2
    moved = [not torch.equal(a, b) for a, b in zip(start, masters.values, strict=True)]
    assert all(moved)
    assert all(v.isfinite().all() for v in masters.values)
    for value, first, mean in zip(masters.values, start, average.values, strict=True):
        assert (mean - first).norm() <= (value - first).norm() * 1.1 + 1e-6
    given = zip(masters.values, parameters(flow.modules), strict=True)
    assert all(torch.equal(v.bfloat16(), p) for v, p in given)
    assert not any(module.training for module in flow.modules)


def out_with(folder, **modules):
    """A folder where some parts are trained."""
    folder.mkdir(exist_ok=True)
    for name, module in modules.items():
        facts = {"scale": "1.5", "shift": "0.25"} if name == "vae" else {}
        command._write(folder / f"{name}.safetensors", module.state_dict(), **facts)
    return folder


@pytest.mark.parametrize("last", ["flow", "guided"])
def test_one_file_holds_what_is_trained_so_far(tmp_path, parts, last):
    def flow(fill):
        modules = nn.ModuleDict({name: copy.deepcopy(parts[name]) for name in TRAINED})
        for parameter in modules.parameters():
            nn.init.constant_(parameter, fill)
        return modules

    seen = Recogniser()
    command.assemble(model.parts(), out_with(tmp_path, vae=parts["vae"], recogniser=seen))
    assert not (tmp_path / "spark.safetensors").exists()
    fills = {"flow": 0.25, "guided": 0.5} if last == "guided" else {"flow": 0.25}
    out_with(tmp_path, **{name: flow(fill) for name, fill in fills.items()})
    command.assemble(model.parts(seed=1), tmp_path)
    again = {**model.parts(seed=2), "recogniser": Recogniser()}
    weights.restore(again, tmp_path / "spark.safetensors")
    assert again["vae"].config.scaling_factor == 1.5
    for name in TRAINED:
        assert all((p == fills[last]).all() for p in again[name].parameters()), name
    for key, tensor in seen.state_dict().items():
        assert torch.equal(again["recogniser"].state_dict()[key], tensor.half().float()), key


@pytest.fixture
def settings(monkeypatch):
    """Train on the CPU, and leave torch's settings as they were."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cudnn = torch.backends.cudnn
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul, cudnn, cudnn.conv
    named = [(backend, "fp32_precision") for backend in backends]
    before = [(*at, getattr(*at)) for at in (*named, (cudnn, "benchmark"))]
    matmul = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(matmul)
    for of, name, value in before:
        setattr(of, name, value)


@pytest.fixture
def run(monkeypatch, tmp_path, settings):
    """Do as `python -m spark_training` does."""

    def run(*budget):
        small = ["--out", str(tmp_path), "--pool", "40", "--batch", "4", "--sizes", "1"]
        monkeypatch.setattr(sys, "argv", ["training", *small, *budget])
        monkeypatch.delitem(sys.modules, "spark_training.__main__", raising=False)
        with torch.random.fork_rng():
            runpy.run_module("spark_training", run_name="__main__")
        return {p.name: p.read_bytes() for p in sorted(tmp_path.glob("*.safetensors"))}

    return run


def steps_of(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["clock"])["steps"]


def _parts(files):
    """Every file but the one of all parts, whose facts come in any order."""
    return {name: made for name, made in files.items() if name != "spark.safetensors"}


@exhaustive
@pytest.mark.slow
def test_training_runs_in_small_and_resumes(run, tmp_path, monkeypatch):
    once = run("--steps", "1", "1", "2", "2")
    names = ("vae", "recogniser", "flow", "guided")
    assert sorted(once) == sorted(f"{name}.safetensors" for name in (*names, "spark"))
    assert [steps_of(tmp_path / f"{name}.safetensors") for name in names[2:]] == [2, 2]
    logs = {name: (tmp_path / f"{name}.jsonl").read_text() for name in names}
    assert all(json.loads(line) for log in logs.values() for line in log.splitlines())

    def refuse(*_, **__):
        raise AssertionError("a part that was trained is trained again")

    for name in ("vae", "recogniser"):
        monkeypatch.setattr(f"spark_training.{name}.train_{name}", refuse)
    again = run("--steps", "1", "1", "2", "2")
    assert _parts(again) == _parts(once), "a budget that was spent was spent again"
    assert {name: (tmp_path / f"{name}.jsonl").read_text() for name in names} == logs
    more = run("--steps", "1", "1", "4", "2")
    changed = {name for name, made in _parts(more).items() if made != once[name]}
    assert changed == {"flow.safetensors"}
    assert steps_of(tmp_path / "flow.safetensors") == 4
    assert not list(tmp_path.glob("*.part"))


@exhaustive
@pytest.mark.slow
def test_a_minutes_budget_counts_what_was_spent(run, tmp_path, parts):
    out_with(tmp_path, vae=parts["vae"], recogniser=Recogniser())
    run("--steps", "1", "1", "2", "2", "--parts", "flow")
    before = (tmp_path / "flow.safetensors").read_bytes()
    with safe_open(tmp_path / "flow.safetensors", "pt") as file:
        seconds = json.loads(file.metadata()["clock"])["seconds"]
    assert seconds > 0
    run("--minutes", "1", "1", str(seconds / 61), "1", "--parts", "flow")
    assert (tmp_path / "flow.safetensors").read_bytes() == before


@exhaustive
@pytest.mark.slow
def test_guidance_is_not_distilled_from_a_flow_that_is_not_done(run, tmp_path, parts):
    out_with(tmp_path, vae=parts["vae"], recogniser=Recogniser())
    made = run("--steps", "1", "1", "4", "4", "--stop-after", "0.000001")
    assert steps_of(tmp_path / "flow.safetensors") < 4
    assert "guided.safetensors" not in made


def test_the_vaes_file_keeps_its_scale(tmp_path, parts):
    out_with(tmp_path, vae=parts["vae"])
    other = model.parts(seed=1)["vae"]
    command._load_vae(other, tmp_path / "vae.safetensors", "cpu")
    assert (other.config.scaling_factor, other.config.shift_factor) == (1.5, 0.25)
    for key, tensor in parts["vae"].state_dict().items():
        assert torch.equal(other.state_dict()[key], tensor.half().float()), key


@pytest.mark.usefixtures("settings")
def test_budgets_are_minutes_unless_steps_are_asked_for(tmp_path, monkeypatch):
    def budgets(*asked):
        seen = []
        monkeypatch.setattr(sys, "argv", ["training", "--out", str(tmp_path), *asked])
        monkeypatch.setattr(command, "build", lambda: {"vae": None})
        monkeypatch.setattr(command, "_load_vae", lambda *_: None)
        monkeypatch.setattr(
            command, "_convolutions", lambda part, _m, _o, budget, *_: seen.append((part, budget))
        )
        monkeypatch.setattr(
            command, "_flow",
            lambda _m, _o, budget, *_, part, **__: [seen.append((part, budget))],
        )  # fmt: skip
        with torch.random.fork_rng():
            command.main()
        assert [part for part, _ in seen] == [p for p in command.PARTS if p in dict(seen)]
        return [(b.amount, b.unit) for _, b in seen]

    assert budgets() == [(m, "minutes") for m in (5.0, 6.0, 60.0, 15.0)]
    assert budgets("--minutes", "1", "2", "0.5", "3") == [
        (m, "minutes") for m in (1.0, 2.0, 0.5, 3.0)
    ]
    assert budgets("--steps", "2", "3", "4", "5") == [(s, "steps") for s in (2, 3, 4, 5)]
    assert budgets("--steps", "2", "3", "4", "5", "--parts", "flow") == [(4, "steps")]
    with pytest.raises(SystemExit):
        budgets("--steps", "2", "3", "4", "5", "--minutes", "1", "1", "1", "1")
    with pytest.raises(SystemExit):
        budgets("--parts", "nothing")


@pytest.mark.usefixtures("settings")
def test_both_parts_of_the_flow_see_the_same_edits(tmp_path, monkeypatch):
    """Drawing them takes minutes, so they are drawn once; and not if nothing is left to train."""
    drawn, given = [], []

    def train(*_, draw, part, **__):
        given.append((part, draw()))
        return True

    monkeypatch.setattr(command, "_draw", lambda *_: drawn.append("edits") or drawn)
    monkeypatch.setattr(command, "_flow", train)
    argv = ["training", "--out", str(tmp_path), "--steps", "1", "1", "1", "1"]
    monkeypatch.setattr(sys, "argv", [*argv, "--parts", "flow", "guided"])
    with torch.random.fork_rng():
        command.main()
    assert given == [("flow", ["edits"]), ("guided", ["edits"])]
    monkeypatch.setattr(command, "_flow", lambda *_, **__: True)
    with torch.random.fork_rng():
        command.main()
    assert drawn == ["edits"]


def test_an_edits_target_is_seen_from_a_camera_that_has_moved(encoder, monkeypatch):
    cameras = []
    latents = encoder.latents

    def watch(scenes, shorter, **how):
        cameras.append(scenes.camera)
        return latents(scenes, shorter, **how)

    monkeypatch.setattr(encoder, "latents", watch)
    pool = encoder.edits(24, SMALL, Dice("cameras"))
    before, after = cameras
    assert len(before) == len(after) == len(pool)
    assert not before.any()
    assert after.any(1).all()


def test_diverged_weights_are_not_saved(tmp_path, parts, monkeypatch):
    """The last good file stays."""
    out_with(tmp_path, vae=parts["vae"])
    models = model.parts()

    def diverge(flow, pools, clock, log, workers, *, masters, on_minute, **_):
        masters.values[0].fill_(float("nan"))
        on_minute()

    monkeypatch.setattr(command, "train_flow", diverge)
    with pytest.raises(FloatingPointError, match="diverged"):
        command._flow(
            models, tmp_path, Budget(1, "steps"), Log(tmp_path / "l", silent=True), ALONE,
            part="flow", stop=float("inf"), draw=lambda: (Encoder(models, "cpu"), []), batch=2,
        )  # fmt: skip
    assert not (tmp_path / "flow.safetensors").exists()


@pytest.mark.slow
def test_the_vae_learns(tmp_path):
    vae = model.parts()["vae"]
    log = tmp_path / "log.jsonl"
    train_vae(vae, Budget(60, "steps"), Log(log), "cpu", ((32, 32),), batch=8)
    records = [json.loads(line) for line in log.read_text().splitlines()]
    values = [r["psnr"] for r in records if "psnr" in r]
    assert values[-1] > values[0] + 2
    assert vae.config.scaling_factor != 1
    assert not vae.training


@pytest.mark.slow
def test_the_recogniser_learns(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the share depends on where the weights begin: 0.89 to 0.96
        net, log = Recogniser(), tmp_path / "log.jsonl"
    train_recogniser(
        net, Budget(60, "steps"), Log(log), "cpu", ((32, 32),), batch=16, n=120, peak=5e-3
    )
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert records[0]["step"] == 0
    assert records[-1]["step"] == 60
    assert records[0]["nothing"] < 0.1
    assert records[-1]["nothing"] > 0.8  # the first thing that it learns
    assert not net.training


def test_accuracies_are_shares_of_right_answers():
    """A network that knows the labels is always right, and one that is off by one never."""
    from fluxfire.spark.grounds import GROUNDS
    from fluxfire.spark.recogniser import UNCLEAR
    from fluxfire.spark.scenes import LOOKS
    from fluxfire.spark.things import NAMES, TINTS
    from spark_training.recogniser import labels, stock

    held = stock(12, (64, 64), Dice("held"), "cpu")
    drawn, scenes, smudged, unclear = held
    assert drawn.dtype == torch.uint8
    assert len(drawn) == len(scenes) == len(smudged) == len(unclear) == 12
    things, tints, boxes = labels(scenes, smudged, (64, 64))

    def one_hot(index, count, off):
        right = ((index.clamp_min(0) + off) % count)[:, None]
        return torch.zeros(len(index), count, *index.shape[1:]).scatter_(1, right, 1.0)

    def net(off):
        return lambda _: (
            one_hot(things, len(NAMES) + 2, off),
            one_hot(tints, len(TINTS) + 1, off),
            boxes,
            one_hot(torch.where(unclear, UNCLEAR, scenes.ground), len(GROUNDS) + 1, off),
            one_hot(scenes.look, len(LOOKS), off),
        )

    assert set(accuracy(net(0), held).values()) == {1.0}
    assert set(accuracy(net(1), held).values()) == {0.0}


def test_round_trips_are_measured_in_decibels():
    class Dim:
        """A VAE that gives pictures back 0.1 too dark."""

        def encode(self, x):
            mode = type("Posterior", (), {"mode": lambda _: x})()
            return type("Encoded", (), {"latent_dist": mode})()

        def decode(self, x):
            return type("Decoded", (), {"sample": x - 0.2})()  # of [-1, 1]

    assert round_trip(Dim(), torch.full((3, 3, 4, 4), 0.5)) == pytest.approx(20, abs=1e-3)
