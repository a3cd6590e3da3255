"""Keeps what a calibration has measured in a folder, so that it can go on after an interrupt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from filelock import FileLock, Timeout
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fluxfire import modules
from fluxfire._version import __version__
from fluxfire.bench.calibration.recording import Trace
from fluxfire.bench.examples import Example
from fluxfire.bench.workload import Workload
from fluxfire.diffusers_types import DiffusersPipeline
from fluxfire.errors import BenchError
from fluxfire.kernels import checksum
from fluxfire.protocol import Pass
from fluxfire.text import write_atomically


@dataclass(frozen=True)
class Edit:
    """One edit that was compared with the same edit with all steps.

    Attributes:
        psnr: in dB.
        edited: PSNR inside the edited region, in dB; None if there is none.
        seconds: it took.
        work: in full steps.
        hits: number of skipped steps.
        right: whether the edit is right; None if no program can check it.
    """

    psnr: float
    edited: float | None
    seconds: float
    work: float
    hits: int
    right: bool | None


@dataclass(frozen=True)
class Plain:
    """One edit with all steps.

    Attributes:
        picture: the result.
        seconds: it took.
        traces: of its samples and branches; empty if it was not recorded.
    """

    picture: Image.Image
    seconds: float
    traces: tuple[Trace, ...] = ()


class Journal:
    """The measured edits, in memory, and in a folder if there is one."""

    def __init__(self, folder: Path | None = None, lock: FileLock | None = None) -> None:
        self._folder, self._lock = folder, lock
        self._edits: dict[tuple[str, int], Edit] = {}

    def close(self) -> None:
        """Let another calibration use the folder."""
        if self._lock is not None:
            self._lock.release()

    @classmethod
    def open(cls, folder: str | Path | None, fingerprint: Callable[[], str]) -> Journal:
        """Open a journal, or go on with one.

        Args:
            folder: made if needed; None keeps nothing.
            fingerprint: returns that of the calibration's model, examples and settings. Reading
                all weights takes a while, so it is called only for a folder.

        Raises:
            BenchError: the folder holds something else, its files are damaged, or another
                calibration uses it now.
            OSError: the folder cannot be made or read.
        """
        if folder is None:
            return cls()
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise BenchError(f"{folder} is a file; give a folder to keep the edits in")
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise BenchError(
                f"another calibration uses {folder} now; wait for its end, or choose another folder"
            ) from None
        made = cls(folder, lock)
        try:
            cls._check_folder(folder, fingerprint)
            made._read_edits()
        except BaseException:
            made.close()
            Path(lock.lock_file).unlink(missing_ok=True)  # the folder may be somebody's own
            raise
        return made

    @staticmethod
    def _check_folder(folder: Path, fingerprint: Callable[[], str]) -> None:
        identity = folder / "calibration.json"
        if identity.exists():
            try:
                known = json.loads(identity.read_text(encoding="utf-8"))["fingerprint"]
            except (ValueError, KeyError, TypeError) as error:
                raise BenchError(f"{identity} is damaged; delete {folder}") from error
            if known != fingerprint():
                raise BenchError(
                    f"{folder} holds the calibration of another model, LoRA, list of passes, "
                    f"workload, seed, set of examples, device, or version of fluxfire, torch or "
                    f"diffusers; choose another folder, or delete it"
                )
        elif any(not _is_a_leftover(path) for path in folder.iterdir()):
            raise BenchError(f"{folder} holds other files; choose an empty folder")
        else:
            write_atomically(identity, json.dumps({"fingerprint": fingerprint()}) + "\n")

    def plain(self, number: int) -> Plain | None:
        """Return an example's edit with all steps, if it was made and its files are whole."""
        if self._folder is None or not self._file(number, ".safetensors").exists():
            return None
        try:
            return self._read_plain(number)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            return None  # damaged: that edit is made again

    def _read_plain(self, number: int) -> Plain:
        facts = self._file(number, ".safetensors")
        with safe_open(facts, "pt") as file:
            seconds = float(file.metadata()["seconds"])
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        traces = tuple(
            Trace(held[f"{i}.sigmas"], held[f"{i}.products"], held[f"{i}.distances"])
            for i in range(len(held) // 3)
        )
        with Image.open(self._file(number, ".png")) as picture:
            return Plain(picture.convert("RGB"), seconds, traces)

    def keep_plain(self, number: int, plain: Plain) -> None:
        """Write an edit with all steps: the picture first, so that the second file completes it."""
        if self._folder is None:
            return
        plain.picture.save(self._file(number, ".png"))
        tensors = {
            f"{i}.{name}": tensor.contiguous()
            for i, trace in enumerate(plain.traces)
            for name, tensor in vars(trace).items()
        }
        partial = self._file(number, ".part")
        save_file(tensors, partial, metadata={"seconds": repr(plain.seconds)})
        partial.replace(self._file(number, ".safetensors"))

    def edit(self, what: str, number: int) -> Edit | None:
        """Return a measured edit of an example; `what` names the schedule or number of steps."""
        return self._edits.get((what, number))

    def keep_edit(self, what: str, number: int, edit: Edit) -> None:
        """Add a measured edit."""
        self._edits[what, number] = edit
        if self._folder is not None:
            line = json.dumps({"what": what, "example": number, **asdict(edit)})
            with (self._folder / "edits.jsonl").open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def _read_edits(self) -> None:
        path = cast("Path", self._folder) / "edits.jsonl"
        if not path.exists():
            return
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise BenchError(f"{path} is damaged; delete it: its edits are made again") from error
        if cut := text.rpartition("\n")[2]:  # an interrupt cut it short: that edit is made again
            text = text.removesuffix(cut)
            write_atomically(path, text)
        for number, line in enumerate(text.splitlines(), 1):
            try:
                entry = json.loads(line)
                key = entry.pop("what"), entry.pop("example")
                self._edits[key] = Edit(**entry)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise BenchError(
                    f"{path}, line {number} is damaged; delete the line: that edit is made again"
                ) from error

    def _file(self, number: int, suffix: str) -> Path:
        return cast("Path", self._folder) / f"plain-{number:03}{suffix}"


def _is_a_leftover(path: Path) -> bool:
    """Whether a file is of the system, or of a calibration that was cut short at its start."""
    return path.name.startswith(".") or path.suffix == ".part"


def fingerprint(
    pipe: DiffusersPipeline,
    examples: Sequence[Example],
    passes: Sequence[Pass],
    workload: Workload,
    seed: int,
) -> str:
    """Identify a calibration by all that its measurements depend on.

    Of the models it reads the names, shapes, dtypes and checksums of all weights and buffers. One
    without data (offloaded layer by layer) counts by its shape alone.
    """
    digest = hashlib.blake2b(digest_size=16)
    parts: list[object] = [
        __version__, torch.__version__, diffusers.__version__, type(pipe).__name__,
        sorted(dict(pipe.scheduler.config).items()), [repr(p) for p in passes], asdict(workload),
        seed, _device_name(pipe.device),
    ]  # fmt: skip
    for name, component in modules.components(pipe):
        parts.append(name)
        config = getattr(component, "config", None)
        parts.append(repr(config) if config is not None else None)
        for where, module in component.named_modules():
            if modules.has_adapter(module):
                adapted: Any = module
                scaling = repr(vars(module).get("scaling"))
                parts.append((where, adapted.active_adapters, adapted.disable_adapters, scaling))
        for where, weight in (*component.named_parameters(), *component.named_buffers()):
            summed = [] if weight.is_meta else checksum.of([weight.detach()])
            parts.append((where, tuple(weight.shape), str(weight.dtype), summed))
    for part in parts:
        digest.update(repr(part).encode())
    for example in examples:
        picture = example.picture
        shape = picture and (picture.mode, picture.size)
        digest.update(repr((example.instruction, shape)).encode())
        if picture is not None:
            digest.update(picture.tobytes())
    return digest.hexdigest()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
