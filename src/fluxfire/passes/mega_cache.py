"""MegaCache: save compiled artifacts to a file, so that the next process need not compile."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar, cast

import torch
from torch import nn
from typing_extensions import override

from fluxfire import modules
from fluxfire.diffusers_types import Pipeline, Transformer
from fluxfire.environment import environment
from fluxfire.errors import MegaCacheWarning
from fluxfire.model import Call
from fluxfire.passes.shared import artifact_file
from fluxfire.passes.shared.adapters import FoldedAdapter
from fluxfire.passes.shared.artifact_file import ArchiveError, Payload
from fluxfire.passes.shared.artifact_recorder import Key, Recording, give_to_torch, recording
from fluxfire.protocol import Change, Configured, Exactness, Finding, Stage, Target
from fluxfire.reporting.compile_counts import CompileCounts, count_compilations
from fluxfire.runtime.generation import Generation, Listener
from fluxfire.runtime.transaction import Transaction

_GRAPH = "aot_autograd"  # this kind of artifact exists once for each graph


@dataclass(frozen=True)
class MegaCache:
    """Loads compiled artifacts from a file before the first compilation; saves them after `warmup`.

    torch's own mega-cache (`torch.compiler.save_cache_artifacts`) is one blob. If a setting
    changed, torch compiles again without saying why. A new blob replaces the old one. This pass
    stores blobs in a safetensors file. The header says what each blob was compiled for (versions,
    GPU, model, passes and their compiler options), so the report can explain a miss. Saving adds to
    the file, also if other processes save at the same time. The pass records only what this
    pipeline's generations compile in their thread.

    A hit skips inductor, not dynamo: every process traces the Python code again. Measured on an
    H100 (docs, "Passes"): the first edit of a process 17.3 → 8.5 s.

    torch unpickles the blobs, so whoever can write the file can run code in your process. The pass
    therefore refuses a file that others can write, unless it is signed with the key in
    `FLUXFIRE_MEGACACHE_KEY`. A refused or damaged file causes a warning and is not changed; the
    pipeline then compiles as it would without this pass.

    Loading copies the artifacts into torch's caches on disk (`TORCHINDUCTOR_CACHE_DIR`). They stay
    there after `restore`, and serve every process that compiles the same code.

    Attributes:
        path: the file; None means `fluxfire/kontext.megacache` in the user's cache folder.

    Raises:
        TypeError: `path` is not a path.
        ValueError: `path` is empty, or not a valid file name.
    """

    path: str | Path | None = None

    name: ClassVar[str] = "mega-cache"
    stage: ClassVar[Stage] = "artifacts"
    slot: ClassVar[str | None] = "artifacts"
    exactness: ClassVar[Exactness] = "bitwise"

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | Path | None):
            raise TypeError(f"path={self.path!r}; it must be a path, or None")
        if self.path is not None and not str(self.path).strip():
            raise ValueError(f"path={self.path!r} is empty; None means the user's cache folder")
        if self.path is not None:
            if "\0" in str(self.path):
                raise ValueError(f"path={self.path!r} has a zero byte; no file has such a name")
            _expand_home(Path(self.path))

    @property
    def file(self) -> Path:
        """The file of artifacts.

        Raises:
            ValueError: `path` is None, and the user has no home folder.
        """
        if self.path is not None:
            return _expand_home(Path(self.path))
        folder = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return _expand_home(Path(folder)) / "fluxfire" / "kontext.megacache"

    def check(self, target: Target) -> Iterator[Finding]:
        """Report whether the file exists, is trusted, and fits this pipeline."""
        if not any(p.stage == "compile" for p in target.passes):
            yield Finding("info", "no pass of the list compiles, so there is nothing to keep")
        try:
            file = self.file
        except ValueError as error:
            yield Finding("error", str(error))
            return
        wanted = fingerprint(target.pipe, target.passes)
        try:
            payloads = artifact_file.read(file, artifact_file.signing_key())
        except FileNotFoundError:
            yield Finding("info", f"{file} does not exist yet; warmup() will write it")
        except Exception as error:  # noqa: BLE001 - loading the file treats all errors alike, too
            yield Finding("warning", f"{file} will not be used: {_error_text(error)}")
        else:
            # A pass of the list may fold the adapters before anything compiles.
            if not any(_differences(wanted, p, {"adapters"}) == [] for p in payloads):
                why = _mismatch(wanted, payloads)
                yield Finding("info", f"{file} has nothing for this pipeline yet: {why}")

    def apply(self, tx: Transaction) -> Change:
        """Prepare to load at the first generation, after all other passes are applied."""
        store = _ArtifactStore(self.file, tx.pipe)
        tx.listen(store)
        tx.report_facts(store.facts)
        return Change(1, "file of artifacts to load and to save")

    def after_warmup(self, tx: Transaction) -> None:
        """Save what was compiled."""
        for store in tx.find_listeners(_ArtifactStore):
            store.save()


def fingerprint(pipe: Pipeline, passes: Sequence[Configured]) -> dict[str, str]:
    """Return everything that compiled artifacts depend on, by name."""
    transformer, vae = pipe.transformer, pipe.vae
    facts = machine() | {
        # Without its number: processes that share an edit have one GPU each, and one file.
        "device": transformer.device.type,
        "dtype": str(transformer.dtype),
        "transformer": _digest(transformer.config),
        "vae": "none" if vae is None else f"{_digest(vae.config)} {vae.dtype}",
        "adapters": _adapters(transformer),
        "inductor": _inductor(),
    }
    # Settings that `fluxfire.using` can change at run time do not affect compiled code.
    settings = {p.name: p.fixed for p in passes if p.name != MegaCache.name}
    facts |= {
        f"pass {name}": ", ".join(f"{setting}={value!r}" for setting, value in fixed.items())
        for name, fixed in settings.items()
    }
    return {_printable(name): _printable(value) for name, value in facts.items()}


def machine() -> dict[str, str]:
    """Return the part of a fingerprint that machine and packages determine."""
    env = environment()
    facts = {name: env.packages[name] for name in ("torch", "triton", "diffusers")}
    facts |= {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "cuda": env.cuda,
        "gpu": env.gpu,
        "machine": f"{platform.system()} {platform.machine()}",
        # torch's own keys lack it: code for AVX512 misbehaved on AVX2, and the other way round.
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    return {name: str(value) for name, value in facts.items()}


def _digest(config: Mapping[str, object]) -> str:
    # diffusers' private entries have no fixed order, and say where the weights came from.
    settings = {k: v for k, v in dict(config).items() if not k.startswith("_")}
    written = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(written.encode()).hexdigest()[:16]


def _adapters(transformer: Transformer) -> str:
    """Describe the LoRAs and similar adapters that PEFT computes, since they change the graphs.

    A folded LoRA is a weight: its graphs fit another of any name and rank on the same layers.
    """
    parts = modules.submodules(cast("nn.Module", transformer))
    if not any(modules.has_adapter(p) and not isinstance(p, FoldedAdapter) for p in parts):
        return ""
    found = getattr(transformer, "peft_config", None) or {}
    return ", ".join(f"{name} (rank {getattr(c, 'r', '?')})" for name, c in sorted(found.items()))


def _inductor() -> str:
    """Return a digest of inductor's global settings."""
    from torch._inductor import config

    written = repr(sorted(config.save_config_portable().items(), key=lambda item: item[0]))
    return hashlib.sha256(written.encode()).hexdigest()[:16]


def _printable(text: str) -> str:
    return text if text.isprintable() else ascii(text)[1:-1]


def _mismatch(wanted: dict[str, str], payloads: Sequence[Payload]) -> str:
    """Describe how the most similar payload differs from the wanted fingerprint."""
    if not payloads:
        return "it is empty"
    fewest = min((_differences(wanted, p) for p in payloads), key=len)
    changes = [f"{name} {was or 'nothing'} became {now or 'nothing'}" for name, was, now in fewest]
    return "; ".join(changes)


def _differences(
    wanted: dict[str, str], payload: Payload, apart_from: set[str] | None = None
) -> list[tuple[str, str, str]]:
    names = sorted({*wanted, *payload.fingerprint} - (apart_from or set()))
    pairs = [(name, payload.fingerprint.get(name, ""), wanted.get(name, "")) for name in names]
    return [(name, was, now) for name, was, now in pairs if was != now]


def _error_text(error: Exception) -> str:
    """Return an error's message, with its class if it is an unexpected one."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    known = isinstance(error, ArchiveError | OSError)
    return str(error) if known else f"{type(error).__name__}: {error}"


def _expand_home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        why = str(error).rstrip(".")
        raise ValueError(f"path={str(path)!r}: {why}; give MegaCache a full path") from error


@dataclass
class _Loaded:
    """What was loaded from the file for one fingerprint of pipeline, passes and machine.

    Attributes:
        state: a description for the report.
        bytes: size of the loaded blobs.
        graphs: number of graphs in them.
        load_seconds: how long loading took.
        cold_seconds: how long compiling them had taken.
    """

    state: str = "not loaded yet"
    bytes: int = 0
    graphs: int = 0
    load_seconds: float = 0.0
    cold_seconds: float = 0.0


@dataclass(eq=False)
class _ArtifactStore(Listener):
    """Loads artifacts when the fingerprint changes, records compilations, saves on request."""

    file: Path
    pipe: Pipeline
    _fingerprint: dict[str, str] = field(default_factory=dict)
    _loaded: _Loaded = field(default_factory=_Loaded)
    _spent: CompileCounts = field(default_factory=CompileCounts)  # since the file was loaded
    _sizes: set[str] = field(default_factory=set)  # of the current generation
    _known: set[Key] = field(default_factory=set)  # artifacts loaded or recorded before
    _new: list[Payload] = field(default_factory=list)  # to be saved
    _added: str = ""  # what was saved, for the report

    def facts(self) -> dict[str, object]:
        """Report what was loaded, how much time it saved, and what had to be compiled."""
        loaded, spent = self._loaded, self._spent
        missing = f"; {spent.misses} graphs were not in it" if loaded.bytes and spent.misses else ""
        took = loaded.load_seconds + spent.trace_seconds + spent.compile_seconds
        share = min(1.0, spent.hits / loaded.graphs) if loaded.graphs else 0.0
        return {
            "file": str(self.file),
            "state": f"{loaded.state}{missing}{self._added}",
            "loaded_bytes": loaded.bytes,
            "hits": spent.hits,
            "misses": spent.misses,
            "load_seconds": loaded.load_seconds,
            "trace_seconds": spent.trace_seconds,
            "compile_seconds": spent.compile_seconds,
            "saved_seconds": max(0.0, share * loaded.cold_seconds - took) if spent.hits else 0.0,
        }

    @override
    @contextmanager
    def on_generation(self, generation: Generation) -> Iterator[None]:
        """Load before anything compiles, and record what compiles, also if the generation fails."""
        current = fingerprint(self.pipe, generation.passes)
        if current != self._fingerprint:
            self._fingerprint = current
            self._known.clear()
            self._loaded, self._spent = self._load(), CompileCounts()
        self._sizes.clear()
        recorded, compiled = Recording(), CompileCounts()
        try:
            with recording() as recorded, count_compilations() as compiled:
                yield
        finally:
            self._add_new(recorded, compiled)

    @override
    @contextmanager
    def on_step(self, call: Call) -> Iterator[None]:
        """Record the token counts."""
        tokens = call.tokens
        self._sizes.add(f"{tokens.noise}+{tokens.reference}+{tokens.text}")
        yield

    def save(self) -> None:
        """Add the new payloads to the file. A failure causes a warning."""
        if not self._new:
            return
        try:
            artifact_file.add(self.file, self._new, artifact_file.signing_key())
        except Exception as error:  # noqa: BLE001 - a cache's failure must not fail an edit
            self._warn(f"{self.file} was not written: {_error_text(error)}")
            return
        written = sum(len(p.blob) for p in self._new)
        self._added += f"; {len(self._new)} payloads of {written} bytes added"
        self._new.clear()

    def _load(self) -> _Loaded:
        began = time.perf_counter()
        try:
            payloads = artifact_file.read(self.file, artifact_file.signing_key())
        except FileNotFoundError:
            return _Loaded("rebuilt because there was no file")
        except Exception as error:  # noqa: BLE001 - a cache's failure must not fail an edit
            self._warn(f"{self.file} is not used: {_error_text(error)}")
            return _Loaded(f"rebuilt because the file cannot be used: {_error_text(error)}")
        fitting = [p for p in payloads if p.fingerprint == self._fingerprint]
        if not fitting:
            return _Loaded(f"rebuilt because {_mismatch(self._fingerprint, payloads)}")
        taken, refused = [], []
        for payload in fitting:
            try:
                self._known |= give_to_torch(payload.blob)
            except Exception as error:  # noqa: BLE001 - unpickling can raise anything
                refused.append(_error_text(error))
            else:
                taken.append(payload)
        if refused:
            self._warn(
                f"{self.file}: torch could not take {len(refused)} of {len(fitting)} fitting "
                f"payloads ({refused[0]})"
            )
        if not taken:
            return _Loaded(f"rebuilt because torch could not take it: {refused[0]}")
        sizes = sorted({size for p in taken for size in p.sizes})
        return _Loaded(
            f"{len(taken)} payloads loaded, for {', '.join(sizes)} tokens",
            bytes=sum(len(p.blob) for p in taken),
            graphs=sum(kind == _GRAPH for kind, _ in self._known),
            load_seconds=time.perf_counter() - began,
            cold_seconds=sum(p.seconds for p in taken),
        )

    def _add_new(self, recorded: Recording, compiled: CompileCounts) -> None:
        """Collect artifacts that the file lacks, also if torch's cache on disk had them already."""
        self._spent.add(compiled)
        if recorded.problem is not None:
            self._warn(f"the compiled artifacts cannot be kept: {recorded.problem}")
        if not compiled.compiles or recorded.keys <= self._known:
            return
        self._known |= recorded.keys
        self._new.append(
            Payload(
                fingerprint=self._fingerprint,
                sizes=tuple(sorted(self._sizes)),
                seconds=compiled.trace_seconds + compiled.compile_seconds,
                made=datetime.now(UTC).isoformat(timespec="seconds"),
                blob=recorded.blob,
                keys=tuple(sorted(f"{kind} {key}" for kind, key in recorded.keys)),
            )
        )

    def _warn(self, text: str) -> None:
        warnings.warn(text, MegaCacheWarning, stacklevel=2)
