"""MegaCache: keep what was compiled, so that the next process need not compile it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from fluxfire import archive
from fluxfire.archive import DisbelievedError, Payload
from fluxfire.compiling import Compilations, compilations
from fluxfire.environment import environment
from fluxfire.errors import MegaCacheWarning
from fluxfire.generation import Generation, Listener
from fluxfire.protocol import Change, Configured, Exactness, Finding, Stage, Target

if TYPE_CHECKING:
    from fluxfire.kontext import Call
    from fluxfire.transaction import Transaction

Key = tuple[str, str]
"""How torch finds an artifact: its kind, and a hash of all that went into it."""


@dataclass(frozen=True)
class MegaCache:
    """Loads compiled artifacts from a file before the first compilation; saves them after `warmup`.

    torch's own mega-cache (`torch.compiler.save_cache_artifacts`) is a blob that is a silent
    miss when a setting changed and that drops what it held when it is saved again. Here the
    blobs lie in a safetensors file whose header says what each was compiled for (versions,
    GPU, model, passes and their compiler options), so that a miss has a reason; saving adds
    to the file, whoever else is saving; and only what is compiled while this pipeline
    generates is recorded (in another thread at the same time, too: torch has one recorder).

    A hit skips inductor, not dynamo: Python is traced again in every process.

    Whoever writes the file can run code in your process, since torch unpickles the blobs: a
    file that others can write is refused, unless `FLUXFIRE_MEGACACHE_KEY` holds the key that
    it is signed with. A file that is refused, or damaged, is left as it is, with a warning;
    the pipeline then compiles as it would without this pass.

    Loading puts the artifacts into torch's caches on disk (`TORCHINDUCTOR_CACHE_DIR`), where
    they stay after `restore`: they are found by content, by whoever compiles the same.

    Attributes:
        path: the file; None means `fluxfire/kontext.megacache` in the user's cache folder.
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
            payloads = archive.read(file, archive.signing_key())
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
        tx.tell(engine.facts)
        return Change(1, "file of artifacts to load and to save")

    def after_warmup(self, tx: Transaction) -> None:
        """Save what was compiled."""
        for engine in tx.listening(_Engine):
            engine.save()


def fingerprint(pipe: Any, passes: Sequence[Configured]) -> dict[str, str]:
    """Name everything that decides whether compiled artifacts fit, fact by fact."""
    env = environment()
    transformer = pipe.transformer
    # diffusers' own notes in the config are in no order, and say where the weights came from.
    config = {k: v for k, v in transformer.config.items() if not k.startswith("_")}
    written = json.dumps(config, sort_keys=True, default=str)
    facts = {name: env.packages[name] for name in ("torch", "triton", "diffusers")}
    facts |= {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "cuda": env.cuda,
        "gpu": env.gpu,
        "machine": f"{platform.system()} {platform.machine()}",
        "device": transformer.device.type,
        "dtype": str(transformer.dtype),
        "transformer": hashlib.sha256(written.encode()).hexdigest()[:16],
    }
    facts |= {f"pass {p.name}": _settings(p) for p in passes if p.name != MegaCache.name}
    return {name: str(value) for name, value in facts.items()}


def _settings(pass_: Configured) -> str:
    """Write a pass's settings, but for those that change at run time without compiling."""
    fixed = {k: v for k, v in pass_.settings.items() if k not in pass_.tunable}
    return ", ".join(f"{name}={value!r}" for name, value in fixed.items())


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
    return str(error) if isinstance(error, DisbelievedError | OSError) else repr(error)


def _home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        why = str(error).rstrip(".")
        raise ValueError(f"path={str(path)!r}: {why}; give MegaCache a full path") from error


@dataclass(eq=False)
class _Engine(Listener):
    """Loads once, listens to what is compiled, saves on request."""

    file: Path
    pipe: Any
    _passes: tuple[Configured, ...] | None = None
    _wanted: dict[str, str] = field(default_factory=dict)
    _state: str = "not loaded yet"
    _loaded_bytes: int = 0
    _load_seconds: float = 0.0
    _cold_seconds: float = 0.0
    _spent: Compilations = field(default_factory=Compilations)
    _sizes: set[str] = field(default_factory=set)
    _known: set[Key] = field(default_factory=set)
    _new: list[Payload] = field(default_factory=list)

    def facts(self) -> dict[str, object]:
        """Tell the report: what was found, what it spared, what it did not."""
        spent = self._load_seconds + self._spent.trace_seconds + self._spent.compile_seconds
        return {
            "file": str(self.file),
            "state": self._state,
            "loaded_bytes": self._loaded_bytes,
            "hits": self._spent.hits,
            "misses": self._spent.misses,
            "load_seconds": self._load_seconds,
            "trace_seconds": self._spent.trace_seconds,
            "compile_seconds": self._spent.compile_seconds,
            "saved_seconds": max(0.0, self._cold_seconds - spent) if self._spent.hits else 0.0,
        }

    @override
    @contextmanager
    def during(self, generation: Generation) -> Iterator[None]:
        """Load before anything compiles; keep what was compiled, also if the generation fails."""
        if generation.passes is not self._passes:
            self._passes = generation.passes
            self._load()
        self._sizes.clear()
        recorded, compiled = _Recorded(), Compilations()
        try:
            with recorded, compilations() as compiled:
                yield
        finally:
            self._keep(recorded, compiled)

    @override
    @contextmanager
    def around(self, call: Call) -> Iterator[None]:
        """Take down the size."""
        tokens = call.tokens
        self._sizes.add(f"{tokens.noise}+{tokens.reference}+{tokens.text}")
        yield

    def save(self) -> None:
        """Add what is new to the file; a failure is a warning."""
        if not self._new:
            return
        try:
            archive.add(self.file, self._new, archive.signing_key())
        except Exception as error:  # noqa: BLE001 - no edit fails for want of a cache
            self._warn(f"{self.file} was not written: {_words(error)}")
            return
        written = sum(len(p.blob) for p in self._new)
        self._state += f"; {len(self._new)} payloads of {written} bytes added"
        self._new.clear()

    def _load(self) -> None:
        self._wanted = fingerprint(self.pipe, self._passes or ())
        began = time.perf_counter()
        try:
            payloads = archive.read(self.file, archive.signing_key())
        except FileNotFoundError:
            self._state = "rebuilt because there was no file"
            return
        except Exception as error:  # noqa: BLE001 - no edit fails for want of a cache
            self._state = f"rebuilt because the file cannot be used: {_words(error)}"
            self._warn(f"{self.file} is not used: {_words(error)}")
            return
        fitting = [p for p in payloads if p.fingerprint == self._wanted]
        if not fitting:
            self._state = f"rebuilt because {_why(self._wanted, payloads)}"
            return
        taken, refused = [], []
        for payload in fitting:
            try:
                self._known |= _give_to_torch(payload.blob)
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
            self._state = f"rebuilt because torch could not take it: {refused[0]}"
            return
        self._loaded_bytes = sum(len(p.blob) for p in taken)
        self._cold_seconds = sum(p.seconds for p in taken)
        self._load_seconds = time.perf_counter() - began
        sizes = sorted({size for p in taken for size in p.sizes})
        self._state = f"{len(taken)} payloads loaded, for {', '.join(sizes)} tokens"

    def _keep(self, recorded: _Recorded, compiled: Compilations) -> None:
        """Keep what the file does not have; torch's own cache on disk may have had it."""
        self._spent.add(compiled)
        if recorded.keys <= self._known:
            return
        self._known |= recorded.keys
        seconds = compiled.trace_seconds + compiled.compile_seconds
        made = datetime.now(UTC).isoformat(timespec="seconds")
        sizes = tuple(sorted(self._sizes))
        self._new.append(Payload(self._wanted, sizes, seconds, made, recorded.blob))

    def _warn(self, text: str) -> None:
        warnings.warn(text, MegaCacheWarning, stacklevel=2)


def _give_to_torch(blob: bytes) -> set[Key]:
    """Load a blob into torch's caches on disk, and return by what it is found."""
    import torch

    loaded = torch.compiler.load_cache_artifacts(blob)
    if loaded is None:  # torch's answer to damage, beside a log
        raise DisbelievedError("torch cannot read it")
    return _keys(loaded)


def _keys(info: Any) -> set[Key]:
    return {(kind, key) for kind, keys in info.artifacts.items() for key in keys}


class _Recorded:
    """Lets torch record apart from all that was compiled before.

    torch has one recorder, which `with_fresh_cache` swaps for the process. So threads that
    generate at the same time share a fresh one, and the last to leave puts the old one back.

    Attributes:
        blob: what was recorded; empty if nothing was compiled.
        keys: by what it is found.
    """

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _inside: ClassVar[int] = 0
    _fresh: ClassVar[ExitStack] = ExitStack()

    def __init__(self) -> None:
        self.blob = b""
        self.keys: set[Key] = set()

    def __enter__(self) -> None:
        from torch.compiler._cache import CacheArtifactManager

        with _Recorded._lock:
            if _Recorded._inside == 0:
                _Recorded._fresh.enter_context(CacheArtifactManager.with_fresh_cache())
            _Recorded._inside += 1

    def __exit__(self, *_: object) -> None:
        import torch

        with _Recorded._lock:
            try:
                if (saved := torch.compiler.save_cache_artifacts()) is not None:
                    self.blob, self.keys = saved[0], _keys(saved[1])
            finally:
                _Recorded._inside -= 1
                if _Recorded._inside == 0:
                    _Recorded._fresh.close()
