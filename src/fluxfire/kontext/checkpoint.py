"""Int8 checkpoints of FLUX.1 Kontext: half the disk and host memory of bfloat16.

A checkpoint is a folder as `save_pretrained` writes it, except for the transformer and T5. Their
files `int8-*.safetensors` hold the linear layers' weights in int8 (`NAME.weight`) with one
scale for each output channel (`NAME.weight.scale`), and all other tensors in bfloat16. The file
`fluxfire.json` says so. Since the files have names of their own, diffusers refuses the folder
instead of reading int8 numbers without their scales.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from fluxfire._version import __version__
from fluxfire.errors import LoadError
from fluxfire.kernels.int8 import quantize_int8
from fluxfire.kontext.pipeline import KONTEXT
from fluxfire.weights import StoredLinear

MARK = "fluxfire.json"
"""The file that makes a folder an int8 checkpoint."""
FORMAT = "int8-rows-1"
_SCALE = ".scale"  # after the name of a weight
_SHARD = 2 * 2**30
_NAMES = {"transformer": "diffusion_pytorch_model", "text_encoder_2": "model"}
"""The parts to quantize, and what their files are called."""
_PARTS = tuple(_NAMES)

Progress = Callable[[str, int, int], object]
"""Called with a part, the bytes read of it so far, and its bytes in all."""


def is_int8(folder: Path) -> bool:
    """Whether a folder is an int8 checkpoint."""
    return (folder / MARK).is_file()


def quantize(
    source: Path,
    folder: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> int:
    """Write an int8 checkpoint. At most one shard of 2 GiB is in memory.

    Args:
        source: a folder that `save_pretrained` wrote.
        folder: the new folder; it must not exist.
        dtype: dtype of all tensors that are not quantized.
        device: where to quantize; by default the CPU.
        progress: called after each tensor.

    Returns:
        The size of the new folder in bytes.

    Raises:
        LoadError: the source is no Kontext pipeline with safetensors files, or the folder exists.
    """
    _check_source(source, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        made = Path(scratch, folder.name)
        made.mkdir()
        _copy_the_rest(source, made)
        for part in _PARTS:
            writer = _Writer(made / part, dtype, device or torch.device("cpu"))
            writer.write(part, _plain_files(part, source), _on_meta(part, source), progress)
        facts = {"format": FORMAT, "fluxfire": __version__, "dtype": str(dtype).split(".")[1]}
        (made / MARK).write_text(json.dumps(facts, indent=1) + "\n")
        made.rename(folder)
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def read(folder: Path, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Read the parts of an int8 checkpoint that diffusers cannot.

    The tensors are the files, mapped into memory: the system reads what is used.

    Args:
        folder: the checkpoint.
        dtype: dtype of all tensors that are not quantized.

    Returns:
        The transformer and T5, as arguments of `from_pretrained`.

    Raises:
        LoadError: the folder was written by another version, or lacks a tensor.
    """
    try:
        found = dict(json.loads((folder / MARK).read_text())).get("format")
    except (ValueError, TypeError) as error:
        raise LoadError(f"{folder / MARK} cannot be read: {error}") from error
    if found != FORMAT:
        raise LoadError(
            f"{folder} has the format {found!r}, and this fluxfire reads {FORMAT!r}; "
            f"write it again with fluxfire quantize"
        )
    return {part: _read_part(part, folder, dtype) for part in _PARTS}


def _check_source(source: Path, folder: Path) -> None:
    if folder.exists() or folder.is_symlink():
        raise LoadError(f"{folder} exists already; give another folder, or remove it")
    if folder.resolve().is_relative_to(source.resolve()):
        raise LoadError(f"{folder} lies in {source}; give a folder outside of it")
    if is_int8(source):
        raise LoadError(f"{source} is an int8 checkpoint already")
    for part in _PARTS:
        if not (source / part / "config.json").is_file():
            raise LoadError(
                f"{source} has no {part}/config.json: fluxfire quantizes FLUX.1 Kontext pipelines "
                f"that have all their parts"
            )
        _plain_files(part, source)


def _plain_files(part: str, source: Path) -> list[Path]:
    """Return the files that diffusers or transformers would read: no variant, nothing stale.

    Raises:
        LoadError: there is none.
    """
    folder = source / part
    name = _NAMES[part]
    index, single = folder / f"{name}.safetensors.index.json", folder / f"{name}.safetensors"
    # diffusers prefers shards, and transformers a single file.
    if index.is_file() and (part == "transformer" or not single.is_file()):
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise LoadError(f"{index} cannot be read: {error!r}") from error
        files = sorted(folder / str(one) for one in names)
    else:
        files = [single]
    if missing := next((file for file in files if not file.is_file()), None):
        raise LoadError(
            f"there is no {missing}; save the pipeline with pipe.save_pretrained(…), which writes "
            f"safetensors files without a variant"
        )
    return files


def _own_files(folder: Path) -> list[Path]:
    """Return the files of a part of an int8 checkpoint."""
    return sorted(folder.glob("int8-*.safetensors"))


def _copy_the_rest(source: Path, made: Path) -> None:
    """Copy what belongs to the pipeline, apart from the weights of two parts."""
    shutil.copy2(source / "model_index.json", made)
    for name in json.loads((source / "model_index.json").read_text()):
        if name in _PARTS:
            (made / name).mkdir()
            shutil.copy2(source / name / "config.json", made / name)
        elif (source / name).is_dir():
            shutil.copytree(source / name, made / name)


def _on_meta(part: str, folder: Path) -> nn.Module:
    """Build a part without data, from its config."""
    made: Any
    with torch.device("meta"):
        if part == "transformer":
            config = FluxTransformer2DModel.load_config(folder / part)
            made = FluxTransformer2DModel.from_config(config)
        else:
            made = T5EncoderModel(T5Config.from_pretrained(folder / part))
    return made.eval()  # type: ignore[no-any-return]


def _quantized_names(model: Any) -> set[str]:
    """Return the names of the linear layers that a checkpoint has in int8."""
    if not isinstance(model, FluxTransformer2DModel):
        return {name for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    places = [at for block in KONTEXT.blocks(model) for at in KONTEXT.linears(block)]
    wanted = {id(getattr(owner, name)) for owner, name in places}
    return {name for name, part in model.named_modules() if id(part) in wanted}


class _Writer:
    """Writes the files of one part."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self._folder, self._dtype, self._device = folder, dtype, device
        self._shard: dict[str, Tensor] = {}
        self._count = 0

    def write(
        self, part: str, files: list[Path], model: nn.Module, progress: Progress | None
    ) -> None:
        """Copy all tensors of some files, and quantize the weights of some layers.

        Raises:
            LoadError: the files lack a tensor of the model.
        """
        quantized = _quantized_names(model)
        missing = {name for name, _ in model.named_parameters()}
        total, done = sum(file.stat().st_size for file in files), 0
        for name, tensor in _tensors(files):
            missing.discard(name)
            if name.removesuffix(".weight") in quantized and name.endswith(".weight"):
                data, scale = quantize_int8(tensor.to(self._device))
                self._add(name, data)
                self._add(name + _SCALE, scale)
            else:
                floating = tensor.is_floating_point()
                self._add(name, tensor.to(self._dtype) if floating else tensor)
            done += tensor.nbytes
            if progress is not None:
                progress(part, done, total)
        self._flush()
        if missing:
            raise LoadError(f"{files[0].parent} lacks {min(missing)}; download the model again")
        if progress is not None:
            progress(part, total, total)

    def _add(self, name: str, tensor: Tensor) -> None:
        self._shard[name] = tensor.cpu().contiguous()
        if sum(t.nbytes for t in self._shard.values()) >= _SHARD:
            self._flush()

    def _flush(self) -> None:
        if self._shard:
            self._count += 1
            file = self._folder / f"int8-{self._count:05}.safetensors"
            save_file(self._shard, file, metadata={"format": "pt"})
            self._shard = {}


def _tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        try:
            opened: Any = safe_open(file, "pt")
        except (OSError, SafetensorError) as error:
            raise LoadError(f"{file} cannot be read: {error}") from error
        with opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                yield name, opened.get_tensor(name)


def _read_part(part: str, folder: Path, dtype: torch.dtype) -> nn.Module:
    model: Any = _on_meta(part, folder)
    tensors = dict(_tensors(_own_files(folder / part)))
    # transformers keeps T5's `wo` in float32 where the rest is in float16, which it overflows.
    precise = getattr(model, "_keep_in_fp32_modules", None) or ()
    for name in sorted(_quantized_names(model)):
        data = tensors.pop(f"{name}.weight", None)
        scale = tensors.pop(f"{name}.weight{_SCALE}", None)
        if data is None or scale is None:
            raise LoadError(f"{folder / part} lacks {name}.weight or its scales")
        bias = tensors.pop(f"{name}.bias", None)
        owner, _, last = name.rpartition(".")
        keeps = dtype is torch.float16 and last in precise
        layer = StoredLinear.of(data, scale, bias, torch.float32 if keeps else dtype)
        setattr(model.get_submodule(owner), last, layer)
    plain = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
    nn.Module.load_state_dict(model, plain, strict=False, assign=True)
    if part == "text_encoder_2":
        model.tie_weights()  # the file has T5's embedding once
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta and type(tensor) in (nn.Parameter, Tensor):
            raise LoadError(f"{folder / part} lacks {name}")
        tensor.requires_grad_(False)
    return model  # type: ignore[no-any-return]
