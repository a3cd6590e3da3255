"""MegaCache: in the process that compiles, and in new processes that load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from torch._inductor import config as inductor_config
from torch.compiler._cache import CacheArtifactManager

import fluxfire
from fluxfire import presets
from fluxfire.errors import MegaCacheWarning, PlanError
from fluxfire.passes import Compile, FirstBlockCache, FoldedLora, InductorPatch, MegaCache
from fluxfire.passes.mega_cache import fingerprint
from fluxfire.passes.shared import artifact_file
from fluxfire.passes.shared.artifact_file import Payload
from fluxfire.passes.shared.artifact_recorder import recording
from fluxfire.protocol import configured
from fluxfire.runtime.conductor import conductor_of
from fluxfire.testing import edit, tiny_kontext
from passes.test_folded_lora import load
from thinned import exhaustive

FRESH = """
import json, sys
import numpy as np
import fluxfire
from fluxfire.passes import Compile, FirstBlockCache, MegaCache
from fluxfire.testing import edit, tiny_kontext

pipe = tiny_kontext(double_blocks=1, single_blocks=1)
fluxfire.optimize(pipe, eval(sys.argv[1]))
fluxfire.warmup(pipe, [(32, 32)], _auto_resize=False, max_sequence_length=24)
np.save(sys.argv[2], edit(pipe))
print(json.dumps(fluxfire.report(pipe).to_dict()))
"""


def fresh(tmp_path, passes, **environ):
    """Warm up and edit in a new process, whose compiler's cache on disk is empty."""
    number = len(list(tmp_path.glob("*.npy")))
    picture = tmp_path / f"{number}.npy"
    environ |= {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / f"inductor{number}")}
    done = subprocess.run(
        [sys.executable, "-c", FRESH, passes, str(picture)],
        env=os.environ | environ,
        capture_output=True,
        text=True,
        check=True,
    )
    report = json.loads(done.stdout.splitlines()[-1])
    facts = next(p["facts"] for p in report["passes"] if p["name"] == "mega-cache")
    return facts, report["generations"], np.load(picture), done.stderr


@pytest.mark.slow
def test_fresh_processes(tmp_path):
    file = tmp_path / "m"
    passes = f"[FirstBlockCache(0.1), MegaCache({str(file)!r}), Compile()]"
    cold, generations, picture, _ = fresh(tmp_path, passes)
    graphs = generations[0]["compiles"]
    assert (cold["hits"], cold["misses"]) == (0, graphs)
    assert cold["state"].startswith("rebuilt because there was no file; 1 payloads of")
    (payload,) = artifact_file.read(file, None)
    assert payload.sizes == ("64+64+24",)

    # Another threshold compiles the same graphs.
    warm, generations, again, _ = fresh(tmp_path, passes.replace("0.1", "0.1001"))
    assert (warm["hits"], warm["misses"]) == (graphs, 0)
    assert warm["state"] == "1 payloads loaded, for 64+64+24 tokens"
    assert warm["loaded_bytes"] == len(payload.blob)
    assert warm["saved_seconds"] >= 0
    assert np.array_equal(picture, again)
    assert artifact_file.read(file, None) == (payload,)


def test_a_mismatch_says_in_what(pipe, tmp_path, reference):
    file = tmp_path / "m"
    right = fingerprint(pipe, ())
    artifact_file.add(file, [Payload(right | {"gpu": "H100"}, (), 1.0, "", b"x")], None)
    artifact_file.add(file, [Payload(right | {"gpu": "A", "torch": "2"}, (), 1.0, "", b"y")], None)
    before = file.read_bytes()
    fluxfire.optimize(pipe, [MegaCache(file)])
    assert np.array_equal(edit(pipe), reference)
    (report,) = fluxfire.report(pipe).passes
    assert report.facts["state"] == "rebuilt because gpu H100 became None"
    assert "mega-cache: file" in str(fluxfire.report(pipe))
    assert file.read_bytes() == before


def test_what_torch_cannot_read_is_a_warning(pipe, tmp_path, reference):
    artifact_file.add(
        tmp_path / "m", [Payload(fingerprint(pipe, ()), (), 1.0, "", b"no blob")], None
    )
    fluxfire.optimize(pipe, [MegaCache(tmp_path / "m")])
    with pytest.warns(MegaCacheWarning, match="torch could not take 1 of 1 fitting payloads"):
        assert np.array_equal(edit(pipe), reference)


@exhaustive
@pytest.mark.slow
def test_another_kind_of_cpu_compiles_anew(tmp_path):
    """Code for one kind of vector instructions gives NaN, or a crash, on another."""
    passes = f"[MegaCache({str(tmp_path / 'm')!r}), Compile()]"
    capabilities = ("avx2", "default")
    pictures = []
    for number, capability in enumerate(capabilities):
        facts, _, picture, _ = fresh(tmp_path, passes, ATEN_CPU_CAPABILITY=capability)
        assert facts["hits"] == 0, number
        pictures.append(picture)
    assert "cpu AVX2 became DEFAULT" in facts["state"] or "rebuilt because" in facts["state"]
    assert np.abs(pictures[0] - pictures[1]).max() < 1e-4


@pytest.mark.slow
def test_only_this_pipelines_compilations_are_recorded(tmp_path):
    before = set(CacheArtifactManager._seen_artifacts)
    foreign = torch.compile(lambda x: x.sin() + 41)
    foreign(torch.ones(3))
    seen = set(CacheArtifactManager._seen_artifacts)
    foreign_keys = {artifact.key for artifact in seen - before}
    file = tmp_path / "m"
    pipe = tiny_kontext(double_blocks=1, single_blocks=1)
    fluxfire.optimize(pipe, [MegaCache(file), Compile()])
    fluxfire.warmup(pipe, [(32, 32)], _auto_resize=False, max_sequence_length=24)
    assert set(CacheArtifactManager._seen_artifacts) == seen
    (payload,) = artifact_file.read(file, None)
    recorded = CacheArtifactManager.deserialize(payload.blob)
    keys = {artifact.key for some in recorded.values() for artifact in some}
    assert keys
    assert foreign_keys
    assert keys.isdisjoint(foreign_keys)


@pytest.mark.slow
def test_what_torchs_own_cache_had_is_saved_too(tmp_path):
    pipe = tiny_kontext(double_blocks=1, single_blocks=1)
    for name in ("first", "second"):  # the second compiles nothing
        torch.compiler.reset()
        with fluxfire.optimized(pipe, [MegaCache(tmp_path / name), Compile()]):
            fluxfire.warmup(pipe, [(32, 32)], _auto_resize=False, max_sequence_length=24)
            facts = fluxfire.report(pipe).passes[0].facts
    assert facts["misses"] == 0
    first, second = (artifact_file.read(tmp_path / name, None)[0] for name in ("first", "second"))
    assert first.fingerprint == second.fingerprint
    assert len(first.blob) == len(second.blob)


def test_what_decides_whether_artifacts_fit(pipe, monkeypatch):
    def print_of(*passes, pipe=pipe):
        return fingerprint(pipe, tuple(map(configured, passes)))

    plain = print_of(Compile())
    assert plain["torch"] == torch.__version__
    assert print_of(MegaCache("a"), Compile()) == plain
    assert print_of(FirstBlockCache(0.1), Compile()) == print_of(FirstBlockCache(0.2), Compile())
    different = [
        print_of(FirstBlockCache(), Compile()),
        print_of(Compile(dynamic=True)),
        print_of(Compile(), pipe=tiny_kontext(single_blocks=1)),
        print_of(Compile(), pipe=tiny_kontext(dtype=torch.bfloat16)),
        print_of(Compile(), pipe=with_lora()),
    ]
    assert plain not in different
    with inductor_config.patch(epilogue_fusion=False):
        assert print_of(Compile()) != plain
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "other")
    assert print_of(Compile()) != plain


@pytest.mark.slow
def test_the_fingerprint_is_the_same_in_every_process(pipe, tmp_path):
    code = (
        "from fluxfire.passes.mega_cache import fingerprint\n"
        "from fluxfire.testing import tiny_kontext\n"
        "print(sorted(fingerprint(tiny_kontext(), ()).items()))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert said == {f"{sorted(fingerprint(pipe, ()).items())}\n"}
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    assert fingerprint(loaded, ()) == fingerprint(pipe, ())


def blank(tmp_path):
    tmp_path.joinpath("m").write_bytes(b"")


def folder(tmp_path):
    tmp_path.joinpath("m").mkdir()


def shared(tmp_path):
    artifact_file.add(tmp_path / "m", [Payload({}, (), 0.0, "", b"x")], None)
    tmp_path.joinpath("m").chmod(0o666)


@pytest.mark.parametrize(
    ("make", "words"),
    [(blank, "it is empty"), (folder, "Is a directory"), (shared, "can be written by other")],
)
def test_a_file_that_cannot_be_used_is_a_warning(pipe, reference, tmp_path, make, words):
    make(tmp_path)
    (step,) = fluxfire.plan(pipe, [MegaCache(tmp_path / "m")]).steps
    assert any(f.level == "warning" and words in str(f) for f in step.findings)
    fluxfire.optimize(pipe, [MegaCache(tmp_path / "m")])
    with pytest.warns(MegaCacheWarning, match=words):
        assert np.array_equal(edit(pipe), reference)
    facts = fluxfire.report(pipe).passes[0].facts
    assert words in facts["state"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("taken/m", "Not a directory|File exists"),
        ("m/", "Is a directory"),
    ],
)
def test_a_file_that_cannot_be_written_is_a_warning(pipe, tmp_path, path, words, monkeypatch):
    (tmp_path / "taken").write_text("a file")
    (tmp_path / "m").mkdir()
    fluxfire.optimize(pipe, [MegaCache(tmp_path / path)])
    store = next(s for s in _stores(pipe))
    store._new.append(Payload({}, (), 0.0, "", b"x"))
    with pytest.warns(MegaCacheWarning, match=words):
        fluxfire.warmup(pipe, [(32, 32)], _auto_resize=False, max_sequence_length=24)
    assert (tmp_path / "taken").read_text() == "a file"


def _stores(pipe):
    from fluxfire.passes.mega_cache import _ArtifactStore

    return [one for one in conductor_of(pipe).listeners if isinstance(one, _ArtifactStore)]


def test_a_list_that_compiles_nothing_is_remarked_on(pipe, tmp_path):
    (step,) = fluxfire.plan(pipe, [MegaCache(tmp_path / "m")]).steps
    assert "no pass of the list compiles" in str(step.findings[0])


def test_the_article_keeps_its_artifacts_in_the_users_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (mega,) = (p for p in presets.article if p.name == "mega-cache")
    assert mega.file == tmp_path / "fluxfire" / "kontext.megacache"


@pytest.mark.parametrize(
    ("path", "error"),
    [
        (3, TypeError),
        ("", ValueError),
        (" ", ValueError),
        ("a\0b", ValueError),
        ("~nobody-of-that-name/m", ValueError),
    ],
)
def test_bad_paths(path, error):
    with pytest.raises(error, match="path="):
        MegaCache(path)


def test_without_a_home_the_default_path_is_an_error_of_the_plan(pipe, monkeypatch):
    def homeless(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.expanduser", homeless)
    with pytest.raises(PlanError, match="Could not determine home directory"):
        fluxfire.optimize(pipe, [MegaCache()])


def test_whatever_torch_raises_is_a_warning(pipe, tmp_path, reference, monkeypatch):
    artifact_file.add(tmp_path / "m", [Payload(fingerprint(pipe, ()), (), 1.0, "", b"x")], None)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", full)
    fluxfire.optimize(pipe, [MegaCache(tmp_path / "m")])
    with pytest.warns(MegaCacheWarning, match="No space left on device"):
        assert np.array_equal(edit(pipe), reference)
    facts = fluxfire.report(pipe).passes[0].facts
    assert facts["state"] == "rebuilt because torch could not take it: No space left on device"
    assert facts["saved_seconds"] == 0


def loads(blob):
    """Return torch's keys of the artifacts in a blob."""
    artifacts = CacheArtifactManager.deserialize(blob) if blob else {}
    return {(kind, a.key) for kind, some in artifacts.items() for a in some}


def test_threads_share_a_recorder_and_the_last_puts_the_old_one_back():
    manager = CacheArtifactManager
    manager._ensure_cache_artifacts_registered()
    before = manager._seen_artifacts, manager._serializer
    first, second = recording(), recording()
    one, two = first.__enter__(), second.__enter__()
    manager.record_artifact("inductor", "early", b"content")
    first.__exit__(None, None, None)
    assert manager._seen_artifacts is not before[0]
    manager.record_artifact("inductor", "late", b"content")
    manager.record_artifact("autotune", "late", {"a": 1})
    second.__exit__(None, None, None)
    assert (manager._seen_artifacts, manager._serializer) == before
    assert loads(one.blob) == one.keys == {("inductor", "early")}
    late = {("inductor", "late"), ("autotune", "late")}
    assert loads(two.blob) == two.keys == {("inductor", "early"), *late}


def test_what_another_thread_compiles_is_not_recorded():
    import torch._dynamo.callback as dynamo

    CacheArtifactManager._ensure_cache_artifacts_registered()

    def elsewhere():
        with dynamo.callback_handler.install_callbacks("dynamo", "0/0"):
            CacheArtifactManager.record_artifact("inductor", "theirs", b"content")

    with recording() as recorded:
        CacheArtifactManager.record_artifact("inductor", "mine", b"content")
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        with dynamo.callback_handler.install_callbacks("dynamo", "1/0"):
            CacheArtifactManager.record_artifact("inductor", "mine too", b"content")
    assert loads(recorded.blob) == {("inductor", "mine"), ("inductor", "mine too")}


def test_what_cannot_be_recorded_does_not_fail_the_edit(pipe, tmp_path, reference, monkeypatch):
    def broken(_):
        raise RuntimeError("cannot pack")

    monkeypatch.setattr("fluxfire.passes.shared.artifact_recorder._packed", broken)
    fluxfire.optimize(pipe, [MegaCache(tmp_path / "m")])
    with pytest.warns(MegaCacheWarning, match="cannot be kept: RuntimeError.*cannot pack"):
        assert np.array_equal(edit(pipe), reference)


def test_a_pipeline_that_changed_is_looked_up_anew(pipe, tmp_path):
    fluxfire.optimize(pipe, [MegaCache(tmp_path / "m")])
    edit(pipe)
    (store,) = _stores(pipe)
    assert store._fingerprint["dtype"] == "torch.float32"
    store._known.add(("inductor", "old"))
    pipe.to(torch.bfloat16)
    edit(pipe)
    assert store._fingerprint["dtype"] == "torch.bfloat16"
    assert not store._known


def test_the_plan_sees_what_the_generation_will(pipe, tmp_path):
    file = tmp_path / "m"
    passes = [InductorPatch(), MegaCache(file), Compile()]
    wanted = fingerprint(pipe, tuple(map(configured, passes)))
    fluxfire.optimize(pipe, passes)
    seen = []
    store = _stores(pipe)[0]
    load = store._load
    store._load = lambda: seen.append(dict(store._fingerprint)) or load()
    with pytest.raises(RuntimeError, match="enough"), store.on_generation(conductor_of(pipe)):
        raise RuntimeError("enough")
    assert seen == [wanted]


@pytest.mark.slow
def test_a_reset_in_a_callback_hurts_nothing(tmp_path):
    pipe = tiny_kontext(double_blocks=1, single_blocks=1)
    plain = edit(pipe)
    fluxfire.optimize(pipe, [MegaCache(tmp_path / "m"), Compile()])

    def reset(pipe, step, timestep, kwargs):
        if step == 0:
            torch.compiler.reset()
        return kwargs

    assert np.abs(edit(pipe, callback_on_step_end=reset) - plain).max() < 1e-5


def with_lora():
    from peft import LoraConfig

    pipe = tiny_kontext(double_blocks=1, single_blocks=1)
    torch.manual_seed(1)
    targets = ["to_q", "to_v", "to_out.0"]
    pipe.transformer.add_adapter(
        LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=targets), "a"
    )
    return pipe


@pytest.mark.slow
def test_a_loras_scale_does_not_go_stale_in_the_cache(tmp_path, monkeypatch):
    """pytorch #194976 stores symbolic floats as constants; users vary a LoRA's scale."""

    def scaled(pipe, scale, **call):
        return edit(pipe, joint_attention_kwargs={"scale": scale}, **call)

    plain = with_lora()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for scales in ((1.0, 0.5, 0.25), (0.7, 0.2, 0.9)):  # the second time, from the cache
        torch.compiler.reset()
        pipe = fluxfire.optimize(with_lora(), [Compile()])
        for scale in scales:
            assert np.abs(scaled(pipe, scale) - scaled(plain, scale)).max() < 1e-5
        apart = np.abs(scaled(plain, scales[0]) - scaled(plain, scales[1])).max()
        assert apart > 1e-3
    assert sum(run.compiled.hits for run in fluxfire.report(pipe).runs) > 0
    for guidance in (1.5, 4.0):
        far = scaled(pipe, 0.9, guidance_scale=guidance)
        assert np.abs(far - scaled(plain, 0.9, guidance_scale=guidance)).max() < 1e-5


@pytest.mark.slow
def test_a_folded_lora_is_no_part_of_the_compiled_code(tmp_path, monkeypatch):
    """In another process, another LoRA on the same layers finds its code in the file."""
    counts = {}
    for name, rank in (("one", 3), ("two", 5)):
        torch.compiler.reset()
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / name))
        pipe = tiny_kontext(double_blocks=1, single_blocks=1)
        load(pipe, name, ["to_q", "proj_mlp"], rank=rank)
        with fluxfire.optimized(pipe, [FoldedLora(), MegaCache(tmp_path / "file"), Compile()]):
            fluxfire.warmup(pipe, [(32, 32)], _auto_resize=False, max_sequence_length=24)
            plain = tiny_kontext(double_blocks=1, single_blocks=1)
            load(plain, name, ["to_q", "proj_mlp"], rank=rank)
            assert np.abs(edit(pipe) - edit(plain)).max() < 1e-4
            facts = fluxfire.report(pipe).passes[1].facts
            counts[name] = facts["hits"] > 0, facts["misses"] > 0
    assert counts == {"one": (False, True), "two": (True, False)}


def test_the_fingerprint_names_the_adapters_that_peft_computes():
    pipe = tiny_kontext(double_blocks=1, single_blocks=1)
    assert fingerprint(pipe, ())["adapters"] == ""
    fluxfire.optimize(pipe, [FoldedLora()])
    load(pipe, "one", ["to_q"], rank=3)
    edit(pipe, steps=1)
    assert fingerprint(pipe, ())["adapters"] == ""
    load(pipe, "two", ["norm.linear"], rank=2)
    edit(pipe, steps=1)
    assert fingerprint(pipe, ())["adapters"] == "one (rank 3), two (rank 2)"
