"""MegaCache: keep what was compiled, so that the next process need not compile it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import torch
from typing_extensions import override

from fluxfire.environment import environment
from fluxfire.errors import MegaCacheWarning
from fluxfire.model import Call
from fluxfire.passes.shared import artifact_file
from fluxfire.passes.shared.artifact_file import ArchiveError, Payload
from fluxfire.passes.shared.artifact_recorder import Key, Recording, give_to_torch, recording
from fluxfire.protocol import Change, Configured, Exactness, Finding, Stage, Target
from fluxfire.reporting.compile_counts import Compilations, compilations
from fluxfire.runtime.generation import Generation, Listener
from fluxfire.runtime.transaction import Transaction

_GRAPH = "aot_autograd"  # the kind of artifact that a graph has one of


@dataclass(frozen=True)
class MegaCache:
    """Loads compiled artifacts from a file before the first compilation; saves them after `warmup`.

    torch's own mega-cache (`torch.compiler.save_cache_artifacts`) is a blob that is a silent
    miss when a setting changed and that drops what it held when it is saved again. Here the
    blobs lie in a safetensors file whose header says what each was compiled for (versions,
    GPU, model, passes and their compiler options), so that a miss has a reason; saving adds
    to the file, whoever else is saving; and only what is compiled while this pipeline
    generates, in its thread, is recorded.

    A hit skips inductor, not dynamo: Python is traced again in every process. Measured on an H100
    (docs, "Passes"): the first edit of a process 17.3 → 8.5 s.

    Whoever writes the file can run code in your process, since torch unpickles the blobs: a
    file that others can write is refused, unless `FLUXFIRE_MEGACACHE_KEY` holds the key that
    it is signed with. A file that is refused, or damaged, is left as it is, with a warning;
    the pipeline then compiles as it would without this pass.

    Loading puts the artifacts into torch's caches on disk (`TORCHINDUCTOR_CACHE_DIR`), where
    they stay after `restore`: they are found by content, by whoever compiles the same.

    Attributes:
        path: the file; None means `fluxfire/kontext.megacache` in the user's cache folder.

    Raises:
        TypeError: `path` is not a path.
        ValueError: `path` is empty, or no file can have that name.
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
            _home(Path(self.path))

    @property
    def file(self) -> Path:
        """Where the artifacts are kept.

        Raises:
            ValueError: no path was given, and this user has no home.
        """
        if self.path is not None:
            return _home(Path(self.path))
        folder = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return _home(Path(folder)) / "fluxfire" / "kontext.megacache"

    def check(self, target: Target) -> Iterator[Finding]:
        """Say what the file will be good for."""
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
        except Exception as error:  # noqa: BLE001 - as when it is loaded
            yield Finding("warning", f"{file} will not be used: {_words(error)}")
        else:
            if not any(p.fingerprint == wanted for p in payloads):
                yield Finding("info", f"{file} will be added to: {_why(wanted, payloads)}")

    def apply(self, tx: Transaction) -> Change:
        """Load at the first generation, when all that will compile is applied."""
        engine = _Engine(self.file, tx.pipe)
        tx.listen(engine)
        tx.report_facts(engine.facts)
        return Change(1, "file of artifacts to load and to save")

    def after_warmup(self, tx: Transaction) -> None:
        """Save what was compiled."""
        for engine in tx.listening(_Engine):
            engine.save()


def fingerprint(pipe: Any, passes: Sequence[Configured]) -> dict[str, str]:
    """Name everything that decides whether compiled artifacts fit, fact by fact."""
    transformer = pipe.transformer
    facts = machine() | {
        "device": str(transformer.device),
        "dtype": str(transformer.dtype),
        "transformer": _digest(transformer.config),
        "vae": f"{_digest(pipe.vae.config)} {pipe.vae.dtype}",
        "adapters": _adapters(transformer),
        "inductor": _inductor(),
    }
    # Settings that change at run time change nothing that is compiled.
    settings = {p.name: p.fixed for p in passes if p.name != MegaCache.name}
    facts |= {
        f"pass {name}": ", ".join(f"{setting}={value!r}" for setting, value in fixed.items())
        for name, fixed in settings.items()
    }
    return {_printable(name): _printable(value) for name, value in facts.items()}


def machine() -> dict[str, str]:
    """Name what artifacts fit, of the machine and of the packages."""
    env = environment()
    facts = {name: env.packages[name] for name in ("torch", "triton", "diffusers")}
    facts |= {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "cuda": env.cuda,
        "gpu": env.gpu,
        "machine": f"{platform.system()} {platform.machine()}",
        # Not in torch's own keys: code for AVX512 ran wild on AVX2, and the other way round.
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    return {name: str(value) for name, value in facts.items()}


def _digest(config: Any) -> str:
    # diffusers' own notes in a config are in no order, and say where the weights came from.
    settings = {k: v for k, v in dict(config).items() if not k.startswith("_")}
    written = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(written.encode()).hexdigest()[:16]


def _adapters(transformer: Any) -> str:
    """Name LoRA and its like: they change the graphs."""
    found = getattr(transformer, "peft_config", None) or {}
    return ", ".join(f"{name} (rank {getattr(c, 'r', '?')})" for name, c in sorted(found.items()))


def _inductor() -> str:
    """Digest inductor's global settings; it is loaded wherever something compiles."""
    from torch._inductor import config

    written = repr(sorted(config.save_config_portable().items(), key=lambda item: item[0]))
    return hashlib.sha256(written.encode()).hexdigest()[:16]


def _printable(text: str) -> str:
    return text if text.isprintable() else ascii(text)[1:-1]


def _why(wanted: dict[str, str], payloads: Sequence[Payload]) -> str:
    """Say in what the nearest payload differs from what is wanted."""
    if not payloads:
        return "it is empty"
    differing = min((_differing(wanted, p) for p in payloads), key=len)
    said = [f"{name} {was or 'nothing'} became {now or 'nothing'}" for name, was, now in differing]
    return "; ".join(said)


def _differing(wanted: dict[str, str], payload: Payload) -> list[tuple[str, str, str]]:
    names = sorted({*wanted, *payload.fingerprint})
    pairs = [(name, payload.fingerprint.get(name, ""), wanted.get(name, "")) for name in names]
    return [(name, was, now) for name, was, now in pairs if was != now]


def _words(error: Exception) -> str:
    """Say what went wrong; of errors that nobody foresaw, also their kind."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    known = isinstance(error, ArchiveError | OSError)
    return str(error) if known else f"{type(error).__name__}: {error}"


def _home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        why = str(error).rstrip(".")
        raise ValueError(f"path={str(path)!r}: {why}; give MegaCache a full path") from error


@dataclass
class _Loaded:
    """What the file held for one fingerprint."""

    state: str = "not loaded yet"
    bytes: int = 0
    graphs: int = 0
    load_seconds: float = 0.0
    cold_seconds: float = 0.0


@dataclass(eq=False)
class _Engine(Listener):
    """Loads where the fingerprint is new, listens to what is compiled, saves on request."""

    file: Path
    pipe: Any
    _wanted: dict[str, str] = field(default_factory=dict)
    _loaded: _Loaded = field(default_factory=_Loaded)
    _spent: Compilations = field(default_factory=Compilations)
    _sizes: set[str] = field(default_factory=set)
    _known: set[Key] = field(default_factory=set)
    _new: list[Payload] = field(default_factory=list)
    _added: str = ""

    def facts(self) -> dict[str, object]:
        """Tell the report: what was found, what it spared, what it did not."""
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
        """Load before anything compiles; keep what was compiled, also if the generation fails."""
        wanted = fingerprint(self.pipe, generation.passes)
        if wanted != self._wanted:
            self._wanted = wanted
            self._known.clear()
            self._loaded, self._spent = self._load(), Compilations()
        self._sizes.clear()
        recorded, compiled = Recording(), Compilations()
        try:
            with recording() as recorded, compilations() as compiled:
                yield
        finally:
            self._keep(recorded, compiled)

    @override
    @contextmanager
    def on_step(self, call: Call) -> Iterator[None]:
        """Take down the size."""
        tokens = call.tokens
        self._sizes.add(f"{tokens.noise}+{tokens.reference}+{tokens.text}")
        yield

    def save(self) -> None:
        """Add what is new to the file; a failure is a warning."""
        if not self._new:
            return
        try:
            artifact_file.add(self.file, self._new, artifact_file.signing_key())
        except Exception as error:  # noqa: BLE001 - no edit fails for want of a cache
            self._warn(f"{self.file} was not written: {_words(error)}")
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
        except Exception as error:  # noqa: BLE001 - no edit fails for want of a cache
            self._warn(f"{self.file} is not used: {_words(error)}")
            return _Loaded(f"rebuilt because the file cannot be used: {_words(error)}")
        fitting = [p for p in payloads if p.fingerprint == self._wanted]
        if not fitting:
            return _Loaded(f"rebuilt because {_why(self._wanted, payloads)}")
        taken, refused = [], []
        for payload in fitting:
            try:
                self._known |= give_to_torch(payload.blob)
            except Exception as error:  # noqa: BLE001 - unpickling, or a full disk
                refused.append(_words(error))
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

    def _keep(self, recorded: Recording, compiled: Compilations) -> None:
        """Keep what the file does not have; torch's own cache on disk may have had it."""
        self._spent.add(compiled)
        if recorded.problem is not None:
            self._warn(f"what was compiled cannot be kept: {recorded.problem}")
        if not compiled.compiles or recorded.keys <= self._known:
            return
        self._known |= recorded.keys
        self._new.append(
            Payload(
                fingerprint=self._wanted,
                sizes=tuple(sorted(self._sizes)),
                seconds=compiled.trace_seconds + compiled.compile_seconds,
                made=datetime.now(UTC).isoformat(timespec="seconds"),
                blob=recorded.blob,
                keys=tuple(sorted(f"{kind} {key}" for kind, key in recorded.keys)),
            )
        )

    def _warn(self, text: str) -> None:
        warnings.warn(text, MegaCacheWarning, stacklevel=2)
