"""A file of compiled artifacts: its format, and the rules for trusting it.

It is a safetensors file. The header says what each payload was compiled for. The payloads are
torch's own bytes, which this module does not interpret. torch unpickles a payload when it loads it,
so whoever can write the file can run code in the process that reads it. Therefore a file is trusted
only if nobody else can write it, or if it is signed with a key that only trusted writers have.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import math
import os
import re
import stat
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

FORMAT = 1
KEY_VARIABLE = "FLUXFIRE_MEGACACHE_KEY"
"""Environment variable with the signing key: any text, the same for all who share the file."""
_MARK = "fluxfire.megacache"
_LARGEST = 1 << 30  # bytes; a real file has a few hundred MiB at most
_LARGEST_HEADER = 4 << 20  # bytes of JSON; the header is parsed before the file is trusted
_LOCK_SECONDS = 60
_QUOTED = 200  # longest quotation from a file in a message, in characters
_DAMAGE = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
    SafetensorError,
)


class ArchiveError(Exception):
    """The file is not used, and not changed; the message says why."""


@dataclass(frozen=True)
class Payload:
    """The artifacts that one process compiled.

    Attributes:
        fingerprint: everything that the artifacts depend on, by name.
        sizes: the token counts that were run ("4096+4096+512"), sorted.
        seconds: compile time in seconds.
        made: time of the compilation, in UTC (ISO 8601).
        blob: torch's own bytes.
        keys: torch's keys of the artifacts in the blob ("kind key"), sorted.
    """

    fingerprint: Mapping[str, str]
    sizes: tuple[str, ...]
    seconds: float
    made: str
    blob: bytes
    keys: tuple[str, ...] = ()

    @cached_property  # reading or writing a file needs it several times
    def digest(self) -> str:
        """SHA-256 of the bytes, in hexadecimal."""
        return hashlib.sha256(self.blob).hexdigest()


def signing_key() -> bytes | None:
    """Return the signing key of the environment, or None if there is none."""
    return os.fsencode(os.environ.get(KEY_VARIABLE, "")) or None  # the bytes need not be UTF-8


def read(path: Path, key: bytes | None) -> tuple[Payload, ...]:
    """Read a trusted file.

    Args:
        path: the file.
        key: the signing key. With a key, the file must be signed with it, and its permissions do
            not matter. Without a key, nobody else may be able to write the file.

    Raises:
        FileNotFoundError: there is no file.
        OSError: the file cannot be read.
        ArchiveError: the file is damaged, has another format or no signature, or somebody else
            could have written it; or there is no file, but others could create one in its folder.
    """
    return _read(path, key)[0]


def peek(path: Path) -> tuple[Payload, ...]:
    """Read a file without trusting it, to show its header. Never load its payloads into torch.

    Raises:
        OSError: the file cannot be read.
        ArchiveError: the file is damaged, or has another format.
    """
    with _opened(_real(path)) as file:
        return _unpack(file.read())[0]


def add(path: Path, payloads: Iterable[Payload], key: bytes | None) -> None:
    """Add payloads to a file and keep its old ones, also if other processes add at the same time.

    The new content is written to a second file, which then replaces the first. So no reader sees
    half a file, and a writer that dies leaves none. The file keeps its permissions. A new unsigned
    file is readable by its owner only; for a new signed file the umask decides.

    Raises:
        OSError: the folder cannot be written, or the disk is full; the old file is unchanged.
        TimeoutError: another process held the lock for a minute.
        ArchiveError: the existing file is not trusted, or is signed and there is no key to sign it
            again, or the new file could not be read back; the old file is unchanged.
    """
    from filelock import FileLock  # torch depends on it

    given, path = path, _real(path)  # replace the link's target, not the link
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    mode = 0o600 if key is None else 0o666  # a signed file may have writers of several users
    with FileLock(f"{path}.lock", timeout=_LOCK_SECONDS, mode=mode):
        try:
            present, signature = _read(given, key)
        except FileNotFoundError:
            present, signature = (), ""
        if signature and key is None:
            raise ArchiveError(f"it is signed, and without {KEY_VARIABLE} would get no signature")
        data = _pack(_merged([*present, *payloads]), key)
        _unpack(data)  # raises if the new file could not be read back
        if len(data) > _LARGEST:
            raise ArchiveError(
                f"it would have {len(data)} bytes, more than the limit of {_LARGEST}; delete it to "
                f"start anew"
            )
        _replace(path, data, private=key is None)


def _real(path: Path) -> Path:
    try:
        return path.resolve()
    except RuntimeError as error:
        raise ArchiveError("it is a link that leads back to itself") from error


def _read(path: Path, key: bytes | None) -> tuple[tuple[Payload, ...], str]:
    """Return the payloads, and the signature; the latter is empty if the file is unsigned."""
    real = _real(path)
    # Whoever can write a folder can replace the file or the link in it.
    for folder in dict.fromkeys((path.absolute().parent, real.parent)):
        if key is None and (why := _writable_by_others(f"its folder {folder}", folder.stat())):
            raise ArchiveError(why)
    with _opened(real) as file:
        if key is None and (why := _writable_by_others("it", os.fstat(file.fileno()))):
            raise ArchiveError(why)
        data = file.read()
    payloads, signature = _unpack(data)
    if key is not None and not signature:
        raise ArchiveError(f"it is not signed, and {KEY_VARIABLE} is set")
    if key is not None and not hmac.compare_digest(signature, _sign(_header(payloads), key)):
        raise ArchiveError(f"it was signed with another key than {KEY_VARIABLE} holds")
    return payloads, signature


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a regular file of acceptable size."""
    with open(path, "rb", opener=_open_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ArchiveError("it is a pipe or a device, not a file")
        if status.st_size > _LARGEST:
            raise ArchiveError(f"it has {status.st_size} bytes, more than any megacache has")
        yield file


def _open_without_waiting(path: str, flags: int) -> int:
    """Open a path; opening a pipe without a writer would wait forever otherwise."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _merged(payloads: Sequence[Payload]) -> list[Payload]:
    """Drop payloads whose artifacts another payload of the same fingerprint has.

    The remaining payload gets the sizes of both. Artifacts are compared by key, since two processes
    that compile the same code get different bytes.
    """
    kept: list[Payload] = []
    for payload in payloads:
        for number, other in enumerate(kept):
            if other.fingerprint == payload.fingerprint and (
                other.digest == payload.digest or set(payload.keys) <= set(other.keys) != set()
            ):
                sizes = tuple(sorted({*other.sizes, *payload.sizes}))
                kept[number] = replace(other, sizes=sizes)
                break
        else:
            kept.append(payload)
    return kept


def _replace(path: Path, data: bytes, *, private: bool) -> None:
    _remove_leftovers(path)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        with os.fdopen(os.open(part, flags, 0o600 if private else 0o666), "wb") as file:
            if path.exists():
                old = path.stat()
                with contextlib.suppress(OSError):  # only root can change a file's owner
                    os.chown(part, old.st_uid, old.st_gid)
                part.chmod(stat.S_IMODE(old.st_mode))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:  # an interrupt must not leave a half-written file either
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def _remove_leftovers(path: Path) -> None:
    """Remove half-written files that killed writers of this file left behind."""
    leftover = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{32}}\.part")
    for other in path.parent.iterdir():
        if leftover.fullmatch(other.name):
            with contextlib.suppress(OSError):  # on a shared volume it may be another user's
                other.unlink()


def _writable_by_others(what: str, found: os.stat_result) -> str | None:
    """Return why other users could write a file, or replace it in a folder; None if they cannot."""
    if not hasattr(os, "geteuid"):
        return f"this system does not tell who may write it; sign it, with {KEY_VARIABLE}"
    advice = (
        f"and so run code here; keep a new one where only you can write, "
        f"or sign it, with {KEY_VARIABLE}"
    )
    if found.st_uid not in (os.geteuid(), 0):
        return f"{what} belongs to another user, who could write it {advice}"
    sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not sticky:
        return f"{what} can be written by other users, who could change it {advice}"
    return None


def _header(payloads: Sequence[Payload]) -> str:
    """Return the payloads' metadata, with their digests, as canonical JSON."""
    facts = [
        {
            "fingerprint": dict(p.fingerprint),
            "sizes": list(p.sizes),
            "seconds": p.seconds,
            "made": p.made,
            "sha256": p.digest,
            "keys": list(p.keys),
        }
        for p in payloads
    ]
    return json.dumps({"format": FORMAT, "payloads": facts}, sort_keys=True)


def _sign(header: str, key: bytes) -> str:
    return hmac.new(key, header.encode(), "sha256").hexdigest()


def _seal(header: str) -> str:
    return hashlib.sha256(header.encode()).hexdigest()


def _pack(payloads: Sequence[Payload], key: bytes | None) -> bytes:
    header = _header(payloads)
    return _bytes(payloads, header, _sign(header, key) if key is not None else "")


def _bytes(payloads: Sequence[Payload], header: str, signature: str) -> bytes:
    import numpy as np
    from safetensors.numpy import save

    envelope = {"header": header, "hmac-sha256": signature, "sha256": _seal(header)}
    arrays = {str(i): np.frombuffer(p.blob, np.uint8) for i, p in enumerate(payloads)}
    return save(arrays, metadata={_MARK: json.dumps(envelope)})


def _unpack(data: bytes) -> tuple[tuple[Payload, ...], str]:
    """Return payloads and signature. The bytes must be exactly the result of `_bytes`."""
    from safetensors.numpy import load

    if not data:
        raise ArchiveError("it is empty")
    try:
        metadata = _metadata(data)
        if metadata is None:
            raise ArchiveError("it is no megacache")
        envelope = json.loads(metadata)
        header, signature = envelope["header"], envelope["hmac-sha256"]
        if not re.fullmatch(r"([0-9a-f]{64})?", signature):
            raise ArchiveError("it is damaged: its signature is none")
        facts = json.loads(header)
        if facts["format"] != FORMAT:
            theirs = _shown(facts["format"])
            raise ArchiveError(f"its format {theirs} is not {FORMAT}, this fluxfire's")
        arrays = load(data)
        payloads = tuple(
            _payload(one, arrays[str(i)].tobytes()) for i, one in enumerate(facts["payloads"])
        )
        if _bytes(payloads, header, signature) != data or _header(payloads) != header:
            raise ArchiveError("it is damaged: its parts do not fit together")
    except _DAMAGE as e:
        why = f"{type(e).__name__}: {_shown(e)}"
        raise ArchiveError(f"it is damaged, or no megacache ({why})") from e
    return payloads, signature


def _shown(foreign: object) -> str:
    """Quote text from a file: without control characters for the terminal, and shortened."""
    text = ascii(str(foreign))[1:-1]
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]} …"


def _metadata(data: bytes) -> Any:
    """Return fluxfire's entry in a safetensors header (8 bytes of length, then JSON)."""
    length = int.from_bytes(data[:8], "little")
    if not 0 < length <= len(data) - 8:
        raise ArchiveError("it is truncated, or no megacache")
    if length > _LARGEST_HEADER:
        raise ArchiveError(f"it is no megacache: its header has {length} bytes")
    return json.loads(data[8 : 8 + length]).get("__metadata__", {}).get(_MARK)


def _payload(facts: Mapping[str, Any], blob: bytes) -> Payload:
    fingerprint = {str(k): str(v) for k, v in facts["fingerprint"].items()}
    sizes, keys = (tuple(str(text) for text in facts[name]) for name in ("sizes", "keys"))
    seconds, made = float(facts["seconds"]), str(facts["made"])
    if not all(map(str.isprintable, (made, *sizes, *keys, *fingerprint, *fingerprint.values()))):
        raise ValueError("a text in it would not print")  # it may control the terminal
    if not math.isfinite(seconds):
        raise ValueError(f"a compilation of {seconds} s")
    return Payload(fingerprint, sizes, seconds, made, blob, keys)
