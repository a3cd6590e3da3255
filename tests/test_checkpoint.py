"""Int8 checkpoints: written shard by shard, read without the plain weights."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline
from safetensors.torch import load_file, save_file

import fluxfire
from fluxfire.cli import main
from fluxfire.errors import FluxfireError, LoadError
from fluxfire.kontext import checkpoint
from fluxfire.passes import FusedBlocks, Int8, Int8TextEncoder, ModulationTable
from fluxfire.passes.shared.eight_bits import QuantizedProduct
from fluxfire.testing import edit, tiny_kontext
from fluxfire.weights import StoredLinear
from passes.test_folded_lora import load as load_lora


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A plain checkpoint in bfloat16, and its int8 twin."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tiny_kontext(dtype=torch.bfloat16).save_pretrained(folder / "plain", max_shard_size="50KB")
    checkpoint.quantize(folder / "plain", folder / "int8", dtype=torch.bfloat16)
    return folder / "plain", folder / "int8"


@pytest.fixture
def stored(folders):
    pipe = fluxfire.load(str(folders[1]), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def dequantized(folders):
    """The plain pipeline, its weights rounded here as the checkpoint's are."""
    pipe = FluxKontextPipeline.from_pretrained(folders[0], dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for part, model in (("transformer", pipe.transformer), ("t5", pipe.text_encoder_2)):
        for name, linear in model.named_modules():
            blocks = "block" in name and "norm" not in name.rpartition("attn")[0][-12:]
            modulation = ".norm1" in name or name.split(".")[-2:-1] == ["norm"]
            if isinstance(linear, torch.nn.Linear) and (
                part == "t5" or (blocks and not modulation and "norm1_context" not in name)
            ):
                weight = linear.weight.detach()  # numbers half-way are many in bfloat16
                scale = weight.abs().amax(1, keepdim=True) / 127
                linear.weight.data = (weight / scale).round() * scale
    return pipe


def test_it_computes_with_the_rounded_weights(folders, stored):
    plain = FluxKontextPipeline.from_pretrained(folders[0], dtype=torch.float32)
    plain.set_progress_bar_config(disable=True)
    made, wanted = edit(stored), edit(dequantized(folders))
    assert np.abs(made - wanted).max() < 2e-5
    assert np.abs(made - edit(plain)).max() > 1e-4
    layers = [m for m in stored.transformer.modules() if isinstance(m, StoredLinear)]
    assert len(layers) == 2 * 12 + 3 * 5


def test_it_is_half_as_large_and_says_what_it_is(folders):
    plain, made = folders
    facts = json.loads((made / checkpoint.MARK).read_text())
    assert facts["format"] == checkpoint.FORMAT
    assert checkpoint.is_int8(made)
    assert not checkpoint.is_int8(plain)
    sizes = [
        sum(f.stat().st_size for f in (folder / "text_encoder_2").glob("*.safetensors"))
        for folder in folders
    ]
    assert sizes[1] < 0.9 * sizes[0]  # the tiny T5 is mostly embeddings


def test_diffusers_refuses_the_folder(folders):
    with pytest.raises(Exception, match="no file named|model.safetensors"):
        FluxKontextPipeline.from_pretrained(folders[1])


PASSES = {
    "none": [],
    "int8": [Int8(activations="plain")],
    "int8 products": [Int8()],
    "fused": [Int8(), Int8TextEncoder(), ModulationTable(host=True), FusedBlocks()],
    "fused alone": [FusedBlocks()],
}


@pytest.mark.parametrize("passes", PASSES.values(), ids=PASSES)
def test_passes_make_of_it_what_they_make_of_the_plain_weights(folders, stored, passes):
    """The same int8 weights, whether they were quantized before or now."""
    twin = FluxKontextPipeline.from_pretrained(folders[0], dtype=torch.float32)
    twin.set_progress_bar_config(disable=True)
    before = edit(stored)
    rounds = any(isinstance(p, Int8) and p.activations == "int8" for p in passes)
    fluxfire.optimize(stored, passes)
    fluxfire.optimize(twin, [Int8(activations="int8" if rounds else "plain")])
    fluxfire.optimize(twin, [p for p in passes if not isinstance(p, Int8 | Int8TextEncoder)])
    fluxfire.restore(twin)
    fluxfire.optimize(
        twin,
        fluxfire.order(
            [
                Int8(activations="int8" if rounds else "plain"),
                Int8TextEncoder(),
                *(p for p in passes if not isinstance(p, Int8 | Int8TextEncoder)),
            ]
        ),
    )
    made = edit(stored)
    assert np.abs(made - edit(twin)).max() < 2e-5
    fluxfire.restore(stored)
    assert np.array_equal(edit(stored), before)


@pytest.mark.parametrize("passes", [[], [Int8()]], ids=["plain", "int8"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_lora_is_added(folders, stored, passes, when):
    twin = dequantized(folders)
    for pipe in (stored, twin):
        if when == "after":
            fluxfire.optimize(pipe, passes)
        load_lora(pipe)
        if when == "before":
            fluxfire.optimize(pipe, passes)
    without = fluxfire.load(str(folders[1]), dtype=torch.float32)
    made, wanted = edit(stored), edit(twin)
    if not passes:
        assert np.abs(made - wanted).max() < 2e-5
    assert np.abs(made - wanted).mean() < 0.05 * np.abs(made - edit(without)).mean()
    products, others = (
        {name: m for name, m in p.transformer.named_modules() if isinstance(m, QuantizedProduct)}
        for p in (stored, twin)
    )
    assert products.keys() == others.keys()
    for name, one in products.items():  # a number on the edge may be rounded either way
        same = one.weight.float() == others[name].weight.float()
        assert same.float().mean() > 0.999, name
        assert torch.allclose(one.scale, others[name].scale, rtol=1e-5), name


def test_copies_and_casts(stored):
    made = edit(stored)
    twin = copy.deepcopy(stored)
    assert np.array_equal(edit(twin), made)
    twin.to(torch.bfloat16)
    layer = twin.transformer.transformer_blocks[0].attn.to_q
    assert (layer.weight.dtype, layer.bias.dtype) == (torch.bfloat16, torch.bfloat16)
    assert layer.stored.data.dtype is torch.int8
    assert edit(twin).shape == made.shape
    assert np.array_equal(edit(stored), made)


def test_what_needs_the_plain_weights_is_refused(stored, tmp_path):
    with pytest.raises(FluxfireError, match="exists in int8 alone.*copy the checkpoint's folder"):
        stored.save_pretrained(tmp_path)
    with pytest.raises(FluxfireError, match="holds in int8 alone.*fluxfire.quantize again"):
        stored.transformer.transformer_blocks[0].attn.to_q.weight.mul_(2)


def test_weights_that_are_loaded_are_quantized(folders, stored):
    """As after `Int8`: a state dict of plain weights counts."""
    plain = FluxKontextPipeline.from_pretrained(folders[0], dtype=torch.float32)
    other = tiny_kontext(seed=1)
    stored.transformer.load_state_dict(other.transformer.state_dict())
    plain.transformer.load_state_dict(other.transformer.state_dict())
    layer = stored.transformer.transformer_blocks[0].attn.to_q
    wanted = other.transformer.transformer_blocks[0].attn.to_q.weight
    near = layer.stored.dequantized(torch.device("cpu"))
    assert (near - wanted).norm() < 0.04 * wanted.norm()


def test_memory_is_kept_with_it(folders):
    pipe = fluxfire.load(str(folders[1]), memory="12GiB")
    names = [p.name for p in fluxfire.report(pipe).passes]
    assert "placement" in names
    fluxfire.restore(pipe)


@pytest.mark.parametrize("spoil", ["format", "tensor"])
def test_a_spoilt_folder_is_refused(folders, tmp_path, spoil):
    folder = tmp_path / "spoilt"
    shutil.copytree(folders[1], folder)
    if spoil == "format":
        (folder / checkpoint.MARK).write_text('{"format": "int8-rows-9"}')
        words = "format 'int8-rows-9'.*reads 'int8-rows-1'"
    else:
        file = folder / "transformer" / "int8-00001.safetensors"
        tensors = load_file(file)
        tensors.pop("x_embedder.bias")
        save_file(tensors, file)
        words = "lacks x_embedder.bias"
    with pytest.raises(LoadError, match=words):
        fluxfire.load(str(folder))


def test_bad_sources_and_targets_are_refused(folders, tmp_path):
    plain, made = folders
    for source, target, words in (
        (plain, made, "exists already"),
        (made, tmp_path / "new", "is an int8 checkpoint already"),
        (tmp_path, plain.parent / "new", "no transformer/config.json"),
        (plain, plain / "int8", "lies in .*a folder outside of it"),
    ):
        with pytest.raises(LoadError, match=words):
            checkpoint.quantize(source, target)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(LoadError, match="is a single file.*from_single_file"):
        fluxfire.load("flux1-kontext-dev.safetensors")


def test_an_interrupt_leaves_no_half_folder(folders, tmp_path):
    def interrupt(part, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.quantize(folders[0], tmp_path / "new", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_the_command(folders, tmp_path, capsys):
    target = tmp_path / "new"
    assert main(["quantize", str(folders[0]), str(target)]) == 0
    printed = capsys.readouterr()
    assert f"wrote {target}" in printed.out
    assert "transformer: " in printed.err
    same = [p.relative_to(folders[1]) for p in folders[1].rglob("*") if p.is_file()]
    assert all((target / name).read_bytes() == (folders[1] / name).read_bytes() for name in same)
    assert main(["quantize", str(folders[0]), str(target)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["quantize", "spark", str(tmp_path / "other")]) == 1
    assert "spark is no checkpoint" in capsys.readouterr().err


def mapped_file(tensor):
    """Return the file that a tensor's memory is a map of; empty for memory of the process's own."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, path = line.split(maxsplit=5) if line.count(" ") >= 5 else (line.split()[0], "")
        low, high = (int(end, 16) for end in span.split("-"))
        if low <= tensor.data_ptr() < high:
            return path.strip()
    return ""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_large_weights_are_the_files_themselves(folders, stored):
    """So that the host never holds the whole model: the system reads what is used."""
    plain = FluxKontextPipeline.from_pretrained(folders[0], dtype=torch.bfloat16)
    for part in ("transformer", "text_encoder_2"):
        linears = [m for m in getattr(plain, part).modules() if isinstance(m, torch.nn.Linear)]
        assert all(mapped_file(one.weight).endswith(".safetensors") for one in linears)
        layers = [m for m in getattr(stored, part).modules() if isinstance(m, StoredLinear)]
        assert layers
        for layer in layers:
            assert "int8-" in mapped_file(layer.stored.data)


@pytest.mark.parametrize("stale", ["variant", "single", "other"])
def test_only_the_files_that_diffusers_reads_count(folders, tmp_path, stale):
    source = tmp_path / "source"
    shutil.copytree(folders[0], source)
    other = tiny_kontext(dtype=torch.bfloat16, seed=1).transformer
    name = {
        "variant": "diffusion_pytorch_model.fp16.safetensors",
        "single": "diffusion_pytorch_model.safetensors",  # beside shards, which come first
        "other": "zz.safetensors",
    }[stale]
    tensors = {k: v.contiguous() for k, v in other.state_dict().items()}
    save_file(tensors, source / "transformer" / name)
    (source / "flux1-kontext-dev.safetensors").write_bytes(b"not a part of the pipeline")
    made = tmp_path / "made"
    checkpoint.quantize(source, made)
    for file in (folders[1] / "transformer").glob("*.safetensors"):
        assert file.read_bytes() == (made / "transformer" / file.name).read_bytes()
    assert {p.name for p in made.iterdir()} == {p.name for p in folders[1].iterdir()}


def test_an_incomplete_source_is_refused(folders, tmp_path):
    source, made = tmp_path / "source", tmp_path / "made"
    shutil.copytree(folders[0], source)
    index = source / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    last = max((source / "transformer").glob("*.safetensors"))
    tensors = load_file(last)
    gone = min(tensors)
    tensors.pop(gone)
    save_file(tensors, last)
    with pytest.raises(LoadError, match=f"lacks {gone}; download"):
        checkpoint.quantize(source, made)
    last.write_bytes(b"cut")
    with pytest.raises(LoadError, match="cannot be read"):
        checkpoint.quantize(source, made)
    last.unlink()
    with pytest.raises(LoadError, match=f"there is no .*{last.name}"):
        checkpoint.quantize(source, made)
    index.write_text("{")
    with pytest.raises(LoadError, match=r"index\.json cannot be read"):
        checkpoint.quantize(source, made)
    assert not made.exists()


def test_copies_and_pickles_keep_hooks_and_numbers(stored):
    made, calls = edit(stored), []
    layer = stored.transformer.transformer_blocks[0].attn.to_q
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    twin = copy.deepcopy(stored.transformer)
    handle.remove()
    again = pickle.loads(pickle.dumps(stored.transformer))
    for one in (twin, again):
        layer = one.transformer_blocks[0].attn.to_q
        assert layer.weight.layer() is layer
        assert not layer.training
        stored.register_modules(transformer=one)
        assert np.array_equal(edit(stored), made)
    assert calls


def test_t5_keeps_in_float32_what_transformers_keeps(folders):
    pipe = fluxfire.load(str(folders[1]), dtype=torch.float16)
    plain = FluxKontextPipeline.from_pretrained(folders[0], dtype=torch.float16)
    for one in (pipe, plain):
        layer = one.text_encoder_2.encoder.block[0].layer[1].DenseReluDense
        assert (layer.wo.weight.dtype, layer.wi.weight.dtype) == (torch.float32, torch.float16)
    words = pipe.encode_prompt("x", "x", max_sequence_length=8)[0]
    assert torch.isfinite(words).all()
