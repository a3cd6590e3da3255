"""API keys: random, stored as hashes, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fluxfire.errors import FluxfireError

_LINE = re.compile(
    r"(?P<name>[\w.@-]+)\s+sha256:(?P<hash>[0-9a-f]{64})"
    r"(\s+edits_per_day=(?P<edits>[1-9]\d{0,8}))?(\s+max_queue=(?P<queue>[1-9]\d{0,8}))?"
)
_PREFIX = "ff_"
_log = logging.getLogger(__name__)


def new_key(name: str) -> tuple[str, str]:
    """Create a key.

    A key has 256 random bits, so nobody can invert its plain hash by guessing.

    Args:
        name: name of the key's owner: letters, digits and `._@-`.

    Returns:
        The key, and its line for the file of keys.

    Raises:
        FluxfireError: the name has other characters.
    """
    key = _PREFIX + secrets.token_urlsafe(32)
    line = f"{name} sha256:{_hash(key)}"
    if _LINE.fullmatch(line) is None:
        raise FluxfireError(f"{name!r} cannot name a key; use letters, digits and ._@-")
    return key, line


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """What a key may do.

    Attributes:
        edits_per_day: most edits from one midnight UTC to the next; None for any number.
        max_queue: most requests in the queue; None for the service's own limit.
    """

    edits_per_day: int | None = None
    max_queue: int | None = None


class Keys:
    """The keys that a service accepts.

    Keys from a file follow it: a line that goes revokes its key at the next request.
    """

    def __init__(self, hashes: Mapping[str, str], path: Path | None = None) -> None:
        """Create them.

        Args:
            hashes: the SHA-256 of each key, in hexadecimal, by its owner's name.
            path: the file that they came from, if any.
        """
        self._hashes, self._path = dict(hashes), path
        self._limits: Mapping[str, KeyLimits] = {}
        self._stamp = path and _stamp(path)

    @classmethod
    def read(cls, path: Path) -> Keys:
        """Read a file of keys, one per line. Empty lines and lines that begin with # are skipped.

        Raises:
            FluxfireError: the file cannot be read, a line has another form, or there is no key.
        """
        keys = cls({}, path)  # it stats before it reads, so no change in between goes unseen
        keys._hashes, keys._limits = _parse(path)
        return keys

    def limits(self, name: str) -> KeyLimits:
        """Return what the key of this name may do."""
        return self._limits.get(name, KeyLimits())

    def owner(self, key: str) -> str | None:
        """Return the owner's name, or None. A wrong key takes as long as a right one."""
        self._follow_file()
        given, found = _hash(key), None
        for name, known in self._hashes.items():
            if hmac.compare_digest(given, known):
                found = name
        return found

    def _follow_file(self) -> None:
        """Read the file again if it changed; a file that is wrong changes no key."""
        if self._path is None or (stamp := _stamp(self._path)) == self._stamp:
            return
        self._stamp = stamp
        try:
            self._hashes, self._limits = _parse(self._path)
        except FluxfireError as error:
            _log.error("the keys stay as they were: %s", error)
        else:
            _log.info("read %d keys from %s", len(self._hashes), self._path)


def _parse(path: Path) -> tuple[dict[str, str], dict[str, KeyLimits]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FluxfireError(f"the keys in {path} cannot be read: {error}") from error
    hashes: dict[str, str] = {}
    limits: dict[str, KeyLimits] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None or match["name"] in hashes:
            why = (
                "names a key a second time"
                if match
                else "is not a name and sha256:HASH, with edits_per_day=N and max_queue=N after it "
                "or neither"
            )
            raise FluxfireError(f"line {number} of {path} {why}")
        hashes[match["name"]] = match["hash"]
        edits, queue = (int(match[part]) if match[part] else None for part in ("edits", "queue"))
        limits[match["name"]] = KeyLimits(edits, queue)
    if not hashes:
        raise FluxfireError(f"{path} holds no key; fluxfire serve --new-key NAME makes one")
    return hashes, limits


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Return what changes when a file does; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
