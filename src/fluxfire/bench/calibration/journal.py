"""Keeps what a calibration has measured in a folder, so that it can go on after an interrupt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from fluxfire._version import __version__
from fluxfire.bench.calibration.recording import Trace
from fluxfire.bench.examples import Example
from fluxfire.bench.workload import Workload
from fluxfire.diffusers_types import DiffusersPipeline
from fluxfire.errors import BenchError
from fluxfire.protocol import Pass
from fluxfire.text import write_atomically

_SMALL = 4096  # elements of a parameter that identifies a model


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

    def __init__(self, folder: Path | None, fingerprint: str) -> None:
        """Open a journal, or go on with one.

        Args:
            folder: made if needed; None keeps nothing.
            fingerprint: of the calibration's model, examples and settings.

        Raises:
            BenchError: the folder holds another calibration.
            OSError: the folder cannot be made or read.
        """
        self._folder = folder
        self._edits: dict[tuple[str, int], Edit] = {}
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        identity = folder / "calibration.json"
        if identity.exists():
            if json.loads(identity.read_text())["fingerprint"] != fingerprint:
                raise BenchError(
                    f"{folder} holds the calibration of another model, list of passes, workload, "
                    f"seed or set of examples; choose another folder, or delete it"
                )
        elif any(folder.iterdir()):
            raise BenchError(f"{folder} holds other files; choose an empty folder")
        else:
            write_atomically(identity, json.dumps({"fingerprint": fingerprint}) + "\n")
        self._read_edits()

    def plain(self, number: int) -> Plain | None:
        """Return an example's edit with all steps, if it was made."""
        if self._folder is None or not (facts := self._file(number, ".safetensors")).exists():
            return None
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
        text = path.read_text(encoding="utf-8")
        if cut := text.rpartition("\n")[2]:  # an interrupt cut it short: that edit is made again
            text = text.removesuffix(cut)
            write_atomically(path, text)
        for line in text.splitlines():
            entry = json.loads(line)
            what, number = entry.pop("what"), entry.pop("example")
            self._edits[what, number] = Edit(**entry)

    def _file(self, number: int, suffix: str) -> Path:
        return cast("Path", self._folder) / f"plain-{number:03}{suffix}"


def fingerprint(
    pipe: DiffusersPipeline,
    examples: Sequence[Example],
    passes: Sequence[Pass],
    workload: Workload,
    seed: int,
) -> str:
    """Identify a calibration: its model by the config and small weights, and its settings."""
    digest = hashlib.blake2b(digest_size=16)
    transformer = pipe.transformer
    for part in (
        __version__, type(pipe).__name__, sorted(dict(transformer.config).items()),
        str(transformer.dtype), [repr(p) for p in passes], asdict(workload), seed,
    ):  # fmt: skip
        digest.update(repr(part).encode())
    for parameter in transformer.parameters():
        if parameter.numel() <= _SMALL:
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
    for example in examples:
        digest.update(example.instruction.encode())
        if example.picture is not None:
            digest.update(repr(example.picture.size).encode() + example.picture.tobytes())
    return digest.hexdigest()
