"""The jobs' database: one file of SQLite, so that jobs survive a restart.

Without a file it is a private temporary database, which ends with the process. Its methods block,
and threads may share it.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from fluxfire.errors import FluxfireError

Status = Literal["queued", "running", "done", "failed", "cancelled"]
_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    status TEXT NOT NULL,
    created REAL NOT NULL,
    finished REAL,
    steps INTEGER NOT NULL,
    step INTEGER NOT NULL DEFAULT 0,
    tries INTEGER NOT NULL DEFAULT 0,
    request TEXT,
    picture BLOB,
    result TEXT,
    error TEXT,
    request_id TEXT,
    idempotency_key TEXT,
    fingerprint TEXT,
    webhook_url TEXT,
    webhook_tries INTEGER NOT NULL DEFAULT 0,
    webhook_due REAL,
    UNIQUE (owner, idempotency_key)
);
CREATE TABLE IF NOT EXISTS edits (
    owner TEXT, day TEXT, count INTEGER NOT NULL, PRIMARY KEY (owner, day)
);
"""


class JobStoreError(FluxfireError):
    """The database cannot be opened, read or written; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class StoredJob:
    """A job's row, without its picture and request.

    Attributes:
        id: the job's id.
        owner: name of the key that began it; empty without keys.
        status: what became of it.
        created: when it began, in seconds since 1970.
        finished: when it ended.
        steps: total number of denoising steps.
        step: number of denoising steps done.
        tries: how often the worker began it.
        result: the answer, in JSON.
        error: the problem, in JSON.
        request_id: the id that the log has of it.
        idempotency_key: the client's own name of the request.
        fingerprint: a hash of the request.
        webhook_url: where the end is announced.
        webhook_tries: how often that was tried.
        webhook_due: when it is tried next; None if it is not due.
    """

    id: str
    owner: str
    status: Status
    created: float
    finished: float | None = None
    steps: int
    step: int = 0
    tries: int = 0
    result: str | None = None
    error: str | None = None
    request_id: str | None = None
    idempotency_key: str | None = None
    fingerprint: str | None = None
    webhook_url: str | None = None
    webhook_tries: int = 0
    webhook_due: float | None = None


_COLUMNS = ", ".join(field.name for field in fields(StoredJob))


class JobStore:
    """The jobs' database."""

    def __init__(self, path: Path | None) -> None:
        """Open or create it.

        Args:
            path: the file; None for a temporary one.

        Raises:
            JobStoreError: the file cannot be used, or another service uses it.
        """
        self.path = path
        self._lock = threading.Lock()
        self._file_lock = FileLock(f"{path}.lock") if path else None
        try:
            if path and self._file_lock:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file_lock.acquire(timeout=0)
                os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # others' words and pictures
            self._rows = sqlite3.connect(path or "", check_same_thread=False, isolation_level=None)
            self._rows.row_factory = sqlite3.Row
            self._prepare()
        except Timeout:
            raise JobStoreError(
                f"another service uses the jobs of {path}; give each service a file of its own"
            ) from None
        except (OSError, sqlite3.Error) as error:
            self._release_file()
            raise JobStoreError(
                f"the jobs in {path or 'a temporary file'} cannot be used: {error}; give a file in "
                f"a writable folder with free space"
            ) from error

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._rows.close()
        self._release_file()

    def add(self, job: StoredJob, request: str | None, picture: bytes | None) -> None:
        """Add a job.

        Args:
            job: its row.
            request: its request in JSON; None if it need not survive a restart.
            picture: its picture's file, if it has one.
        """
        given = {field.name: getattr(job, field.name) for field in fields(job)}
        given |= {"request": request, "picture": picture}
        marks = ", ".join(f":{name}" for name in given)
        self._run(f"INSERT INTO jobs ({', '.join(given)}) VALUES ({marks})", given)  # noqa: S608 - our own names

    def get(self, name: str) -> StoredJob | None:
        """Return the job with an id, or None."""
        return next(iter(self._select("id = ?", name)), None)

    def by_key(self, owner: str, key: str) -> StoredJob | None:
        """Return an owner's job with an idempotency key, or None."""
        return next(iter(self._select("owner = ? AND idempotency_key = ?", owner, key)), None)

    def unfinished(self) -> list[StoredJob]:
        """Return the jobs that have not ended, oldest first."""
        return self._select("finished IS NULL")

    def count(self, owner: str) -> int:
        """Return how many jobs of an owner there are, including those that ended."""
        (row,) = self._run("SELECT count(*) FROM jobs WHERE owner = ?", (owner,))
        return int(row[0])

    def request(self, name: str) -> tuple[str | None, bytes | None]:
        """Return a job's request in JSON and its picture's file."""
        for row in self._run("SELECT request, picture FROM jobs WHERE id = ?", (name,)):
            return row[0], row[1]
        return None, None

    def begin(self, name: str) -> None:
        """Note that the worker began a job."""
        self._run("UPDATE jobs SET status = 'running', tries = tries + 1 WHERE id = ?", (name,))

    def finish(self, name: str, **facts: Any) -> None:
        """Note a job's end, and forget its request.

        Args:
            name: its id.
            **facts: the columns that change.
        """
        facts |= {"request": None, "picture": None}
        changes = ", ".join(f"{column} = :{column}" for column in facts)
        self._run(f"UPDATE jobs SET {changes} WHERE id = :id", {**facts, "id": name})  # noqa: S608 - our own names

    def due_webhooks(self, now: float) -> list[StoredJob]:
        """Return the jobs whose webhook is due."""
        return self._select("webhook_due <= ?", now)

    def set_webhook(self, name: str, tries: int, due: float | None) -> None:
        """Note a try of a webhook, and when the next is due; None for no further one."""
        change = "UPDATE jobs SET webhook_tries = ?, webhook_due = ? WHERE id = ?"
        self._run(change, (tries, due, name))

    def forget(self, before: float) -> None:
        """Delete the jobs that ended before a time, but not those whose webhook is still due."""
        self._run("DELETE FROM jobs WHERE finished <= ? AND webhook_due IS NULL", (before,))

    def count_edit(self, owner: str, day: str, most: int) -> bool:
        """Count an edit, and return whether the owner may make it.

        Args:
            owner: whose it is.
            day: the date; counts of other days are deleted.
            most: most edits of that day.
        """
        self._run("DELETE FROM edits WHERE day != ?", (day,))
        counted = self._run(
            "INSERT INTO edits VALUES (?, ?, 1) ON CONFLICT DO UPDATE SET count = count + 1 "
            "WHERE count < ? RETURNING count",
            (owner, day, most),
        )
        return bool(counted)

    def _prepare(self) -> None:
        if self.path:
            self._rows.execute("PRAGMA journal_mode = WAL")
            self._rows.execute("PRAGMA synchronous = NORMAL")
        (version,) = self._rows.execute("PRAGMA user_version").fetchone()
        if version not in (0, _VERSION):
            raise sqlite3.DatabaseError(
                f"its version is {version}, and this fluxfire reads {_VERSION}"
            )
        self._rows.executescript(_SCHEMA)
        self._rows.execute(f"PRAGMA user_version = {_VERSION}")

    def _select(self, where: str, *values: object) -> list[StoredJob]:
        found = self._run(f"SELECT {_COLUMNS} FROM jobs WHERE {where} ORDER BY created", values)  # noqa: S608 - our own words
        return [StoredJob(**row) for row in map(dict, found)]

    def _run(self, statement: str, values: Any = ()) -> list[sqlite3.Row]:
        with self._lock, self._explained():
            return self._rows.execute(statement, values).fetchall()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            raise JobStoreError(
                f"the jobs in {self.path or 'a temporary file'} failed: {error}; look at the free "
                f"space and the permissions of its folder"
            ) from error

    def _release_file(self) -> None:
        if self._file_lock is not None:
            self._file_lock.release()
