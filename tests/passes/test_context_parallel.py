"""ContextParallel: what it refuses, and what several processes make of an edit together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

import fluxfire
from fluxfire.cli import main
from fluxfire.cli.processes import run_together
from fluxfire.cli.run import _edit_and_report
from fluxfire.errors import FluxfireError, PlanError
from fluxfire.kernels.exchange import Shards
from fluxfire.passes import (
    Compile,
    ContextParallel,
    FirstBlockCache,
    FusedBlocks,
    MegaCache,
    ReferenceCache,
)
from fluxfire.passes.mega_cache import fingerprint
from fluxfire.passes.shared.processes import (
    State,
    difference,
    digest,
    is_from_a_group,
    message,
)
from fluxfire.protocol import configured
from fluxfire.testing import tiny_kontext

SCRIPT = Path(__file__).parent.parent / "processes_edit.py"
CLOSE = 1e-5
# Another rounding of one number may become another float8.
LIMITS = {"float8 attention": 5e-5, "float8": 5e-4, "": CLOSE}


def limit(name):
    """Return how far the picture of several processes may be from that of one."""
    return next(x for part, x in LIMITS.items() if part in name)


@pytest.fixture
def processes(monkeypatch):
    """Pretend to be one of some processes, for what only looks."""

    def pretend(count):
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_world_size", lambda *_: count)

    return pretend


def problems(passes, pipe=None):
    plan = fluxfire.plan(pipe or tiny_kontext(heads=4), passes)
    return [str(f) for step in plan.steps for f in step.findings if f.level == "error"]


@pytest.mark.parametrize(
    "settings", [{"kind": "star"}, {"timeout_seconds": 0}, {"timeout_seconds": float("inf")}]
)
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        ContextParallel(**settings)


@pytest.mark.parametrize("seconds", ["60", None, True])
def test_a_timeout_that_is_no_number_is_refused(seconds):
    with pytest.raises(TypeError, match="timeout_seconds"):
        ContextParallel(timeout_seconds=seconds)


def test_without_a_process_group_it_says_how_to_start():
    (why,) = problems([ContextParallel()])
    assert "no initialised process group" in why
    assert "torchrun" in why
    assert "fluxfire run --gpus" in why


def test_one_process_is_refused(processes):
    processes(1)
    (why,) = problems([ContextParallel()])
    assert "this one process only" in why


def test_heads_that_do_not_divide_are_refused_and_ring_is_offered(processes):
    processes(3)
    plan = fluxfire.plan(tiny_kontext(heads=4), [ContextParallel(timeout_seconds=7)])
    assert "3 processes cannot share 4 attention heads" in str(plan.steps[0].findings[0])
    assert plan.suggestion == (ContextParallel("ring", timeout_seconds=7),)


def test_two_of_them_are_refused(processes):
    processes(2)
    plan = fluxfire.plan(tiny_kontext(heads=4), [ContextParallel(), ContextParallel("ring")])
    assert not plan.ok


@pytest.mark.parametrize(
    ("other", "word"),
    [(ReferenceCache(), "a part of the tokens"), (Compile(region="transformer"), "one graph")],
    ids=lambda value: getattr(value, "name", None),
)
def test_what_cannot_be_shared_is_refused(processes, other, word):
    processes(2)
    (why,) = problems([ContextParallel(), other])
    assert word in why


def test_it_goes_with_the_others_in_any_order(processes):
    processes(2)
    passes = [FirstBlockCache(), FusedBlocks(), ContextParallel()]
    assert fluxfire.plan(tiny_kontext(heads=4), fluxfire.order(passes)).ok
    assert fluxfire.plan(tiny_kontext(heads=4), fluxfire.order(passes[::-1])).ok


def test_an_ip_adapter_is_refused(processes):
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    processes(2)
    pipe = tiny_kontext(heads=4)
    pipe.transformer.transformer_blocks[0].attn.processor = FluxIPAdapterAttnProcessor(64, 40)
    (why,) = problems([ContextParallel()], pipe)
    assert "FluxIPAdapterAttnProcessor" in why


def test_diffusers_own_cache_is_refused(processes):
    from diffusers import FirstBlockCacheConfig

    processes(2)
    pipe = tiny_kontext(heads=4)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    (why,) = problems([ContextParallel()], pipe)
    assert "diffusers' own cache" in why


@pytest.mark.parametrize("passes", [[FusedBlocks()], [ContextParallel()]])
def test_a_pipeline_that_the_user_made_parallel_is_refused(processes, passes):
    processes(2)
    pipe = tiny_kontext(heads=4)
    pipe.transformer._parallel_config = SimpleNamespace()
    with pytest.raises(PlanError, match=r"outside fluxfire .*add ContextParallel\(\)"):
        fluxfire.optimize(pipe, passes)


def test_the_file_of_artifacts_serves_all_gpus(monkeypatch):
    pipe = tiny_kontext(heads=4)
    of_cpu = fingerprint(pipe, [configured(MegaCache())])
    monkeypatch.setattr(type(pipe.transformer), "device", torch.device("cuda:1"))
    assert fingerprint(pipe, [configured(MegaCache())]) == {**of_cpu, "device": "cuda"}


def test_heads_are_shared_without_gaps():
    shards = [Shards("ulysses", "", rank, 4) for rank in range(4)]
    assert [one.heads(24) for one in shards] == [slice(i, i + 6) for i in range(0, 24, 6)]
    assert Shards("ring", "", 1, 4).heads(24) == slice(0, 24)


def inputs(**changed):
    generator = torch.Generator().manual_seed(0)
    made = {
        "hidden_states": torch.randn(1, 128, 16, generator=generator),
        "encoder_hidden_states": torch.randn(1, 24, 40, generator=generator),
        "pooled_projections": torch.randn(1, 24, generator=generator),
        "guidance": torch.tensor([3.5]),
    }
    return {**made, **changed}


def said(*of_each, times=None):
    times = torch.linspace(1000, 10, 4) if times is None else times
    digests = [digest(["fused-blocks"], one, times) for one in of_each]
    return torch.stack([message(State.STEP, None, one) for one in digests])


def test_equal_and_nearly_equal_inputs_go_on_together():
    mine = inputs()
    rounded = {name: x.to(torch.bfloat16) for name, x in mine.items()}
    assert difference(said(mine, inputs())) is None
    assert difference(said(mine, rounded)) is None


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("hidden_states", "seed or reference picture"),
        ("encoder_hidden_states", "prompt"),
        ("pooled_projections", "prompt"),
        ("guidance", "guidance"),
    ],
)
def test_other_inputs_are_told_apart(name, word):
    mine = inputs()
    other = inputs(**{name: mine[name] + 0.1 * mine[name].flip(-1).abs()})
    assert word in difference(said(mine, mine, other))


def test_inputs_that_are_no_numbers_are_told_apart():
    broken = inputs(hidden_states=torch.full((1, 128, 16), float("nan")))
    assert difference(said(inputs(), broken)) is not None


@pytest.mark.parametrize("words", [
    "Application timeout caused pair closure",
    "[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:59625",
    "Connection reset by peer",
])  # fmt: skip
def test_an_error_of_gloo_is_known_by_its_words(words):
    assert is_from_a_group(RuntimeError(words))
    assert not is_from_a_group(RuntimeError("CUDA out of memory"))


def start(folder, count, *cases):
    """Run the cases in some processes; return what each process made of them, and their status."""
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, str(SCRIPT), str(folder)]
    said = [folder / f"{rank}.txt" for rank in range(count)]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(count), *cases],
            env={**os.environ, **threads},
            stdout=said[rank].open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank in range(count)
    ]
    try:
        codes = [one.wait(timeout=600) for one in started]
    finally:
        for one in started:
            one.kill()
    if 1 in codes:  # an exception that no case expects
        pytest.fail("\n".join(file.read_text()[-3000:] for file in said))
    files = [folder / f"{rank}.pt" for rank in range(count)]
    return codes, [torch.load(f, weights_only=False) for f in files if f.is_file()]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    edits = ("pictures", "inpainting", "compiled", "the_report", "the_page", "promises")
    failures = ("disagreements", "middle_of_a_step", "a_process_is_stuck", "a_process_dies")
    codes, results = start(tmp_path_factory.mktemp("two"), 2, *edits, *failures)
    assert codes == [0, 3]  # the last case ends the second process
    return results[0]


def errors(results):
    """Return how far each shared picture is from that of one process, in units of what may be."""
    alone = ", alone"
    pairs = {n.removesuffix(alone): n for n in results if n.endswith(alone)}
    apart = {n: np.abs(results[n] - results[of_one]).max() for n, of_one in pairs.items()}
    return {n: x / limit(n) for n, x in apart.items()}


@pytest.mark.slow
def test_two_processes_make_the_picture_of_one(two):
    found = errors(two)
    assert {"lora", "inpaint", "compiled", "passes: fused", "calls: true CFG, ring"} < set(found)
    assert {n: e for n, e in found.items() if not e < 1} == {}


@pytest.mark.slow
def test_the_passes_of_the_test_change_the_picture(two):
    """So that the comparison would see a pass that does nothing on several processes."""
    plain = two["passes: nothing, alone"]
    for name in ("float8", "float8 attention", "hits", "some hits", "schedule", "linear"):
        apart = np.abs(two[f"passes: {name}, alone"] - plain).max()
        assert apart > 2 * limit(name), name


@pytest.mark.slow
def test_four_processes_make_the_picture_of_one(tmp_path):
    codes, results = start(tmp_path, 4, "some_pictures")
    assert codes == [0] * 4
    for one in results:
        found = errors(one)
        assert len(found) == 3
        assert {n: e for n, e in found.items() if not e < 1} == {}


@pytest.mark.slow
def test_the_report_names_processes_and_kind(two):
    assert "5 blocks shared by 2 processes (ulysses)" in two["report"]
    assert two["facts"] == "{'processes': 2, 'kind': 'ulysses', 'rank': 0}"


@pytest.mark.slow
def test_the_script_of_the_documentation_runs(two):
    assert two["page"] == "True"
    assert "shared by 2 processes" in two["page, report"]


@pytest.mark.slow
def test_it_keeps_the_promises_of_a_pass_and_leaves_nothing_behind(two):
    assert two["check_pass"] == "kept"
    assert two["restored"] == "[]"


@pytest.mark.slow
def test_a_copy_is_plain(two):
    assert np.array_equal(two["copy"], two["plain"])


@pytest.mark.slow
def test_diffusers_cannot_split_it_once_more(two):
    assert "already applied" in two["enabled twice"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "word"),
    [
        ("prompt", "another prompt"),
        ("size", "number of picture tokens: 64, 96"),
        ("seed", "another seed or reference picture"),
        ("guidance", "another guidance scale"),
        ("true CFG", "step: 1, 0"),
        ("steps", "number of steps: 4, 5"),
        ("text", "cannot share 23 text tokens"),
        ("raises", "process 1 left this generation with an exception"),
        ("raises after the last step", "process 1 left this generation with an exception"),
        ("raises before the first step", "process 1 left this generation with an exception"),
        ("interrupts", "process 1 ended this generation earlier"),
        ("passes", "other passes"),
        ("kwargs", "cannot share attention_mask"),
    ],
)
def test_processes_that_part_say_so_soon(two, case, word):
    assert two[f"differ: {case}"].startswith("soon: FluxfireError")
    assert word in two[f"differ: {case}"]


@pytest.mark.slow
def test_they_go_on_after_they_parted_between_steps(two):
    assert two["differ: all interrupt"] == "no error"
    assert np.abs(two["differ: afterwards"] - two["plain"]).max() < CLOSE


@pytest.mark.slow
def test_an_exception_in_the_middle_of_a_step_ends_all_and_they_can_connect_again(two):
    assert "soon: FluxfireError: another process stopped in the middle" in two["middle"]
    assert "soon: FluxfireError: the processes lost each other" in two["middle, then"]
    assert two["middle, processor"] == "FluxAttnProcessor"
    assert np.abs(two["middle, again"] - two["plain"]).max() < CLOSE


@pytest.mark.slow
def test_nobody_waits_longer_than_the_timeout(two):
    assert "did not come within 8 seconds" in two["stuck: between"]
    assert "another process stopped in the middle" in two["stuck: within"]
    assert all(two[f"stuck: {where}"].startswith("soon") for where in ("between", "within"))


@pytest.mark.slow
def test_a_process_that_dies_leaves_nobody_waiting(two):
    assert two["dies"].startswith("soon: FluxfireError: another process ended")


@pytest.mark.slow
def test_the_command_shares_an_edit_among_processes(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 48), "navy").save("photo.png")
    edit = ["run", "--image", "photo.png", "--prompt", "night", "--model", "random-tiny"]
    edit += ["--size", "64x48", "--steps", "3", "--device", "cpu"]
    assert main([*edit, "-o", "one.png"]) == 0
    assert main([*edit, "-o", "two.png", "--gpus", "2", "--verbose"]) == 0
    out = capfd.readouterr().out
    assert out.count("saved two.png") == 1
    assert "blocks shared by 2 processes (ring)" in out  # 2 do not divide the 3 heads
    pixels = [np.asarray(Image.open(f"{name}.png")).astype(int) for name in ("one", "two")]
    assert np.abs(pixels[0] - pixels[1]).max() <= 1


@pytest.mark.slow
def test_the_command_tells_the_error_of_a_process():
    arguments = SimpleNamespace(gpus=1, device="cpu", model="random-tiny", memory=None, output="x")
    with pytest.raises(FluxfireError, match="this one process only"):
        run_together(_edit_and_report, arguments, [ContextParallel()])


def test_the_command_refuses_more_gpus_than_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    arguments = SimpleNamespace(gpus=2, device=None)
    with pytest.raises(FluxfireError, match=r"--gpus 2 needs 2 GPUs, and torch finds 1"):
        run_together(print, arguments, [])


def test_the_command_refuses_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(FluxfireError, match="--device cuda needs a GPU"):
        _edit_and_report(SimpleNamespace(device="cuda"), [])
