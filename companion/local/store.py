"""What the endpoint remembers: files, jobs, their events and checkpoints, and fine-tuned models.

One SQLite database in the companion's home, with every object as the API shows it, in JSON, and the columns
that are searched. Contents lie beside it: `files/<id>` and `jobs/<id>/`. Several processes may have it open,
and any of them may be killed at any moment. Nothing here knows of HTTP, or of how models are trained.
"""

import contextlib
import errno
import json
import os
import secrets
import shutil
import sqlite3
import string
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .weights import home

ACTIVE = ("validating_files", "queued", "running")
UNFINISHED = (*ACTIVE, "paused")
RESERVE = 256 << 10  # bytes that are kept back, to say on a full disk that it is full
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, purpose TEXT NOT NULL,
    object TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, status TEXT NOT NULL,
    object TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS events (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, job TEXT NOT NULL, key TEXT NOT NULL,
    object TEXT NOT NULL, UNIQUE (job, key));
CREATE INDEX IF NOT EXISTS events_of_job ON events (job, number);
CREATE TABLE IF NOT EXISTS checkpoints (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, job TEXT NOT NULL, model TEXT NOT NULL,
    object TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS models (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, job TEXT NOT NULL, base TEXT NOT NULL,
    adapter TEXT NOT NULL, object TEXT NOT NULL);
"""


class StoreError(RuntimeError):
    """What is to be remembered cannot be written. `full`: because there is no space left."""

    def __init__(self, message: str, full: bool) -> None:
        super().__init__(message)
        self.full = full


@dataclass(frozen=True)
class TunedModel:
    """A fine-tuned model: the job it came from, the model it stands on, and its GGUF adapter."""

    name: str
    job: str
    base: str
    adapter: Path


@contextmanager
def reported(folder: Path) -> Iterator[None]:
    """What the disk or SQLite refuses, raised as StoreError."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        sqlite_full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
        full = sqlite_full or getattr(error, "errno", None) in FULL
        mend = "free some space" if full else "see that this folder can be written"
        reason = getattr(error, "strerror", None) or error
        raise StoreError(f"The endpoint cannot write to {folder} ({reason}): {mend}.", full) from error


def new_id(prefix: str, size: int = 24) -> str:
    """An id of OpenAI's form: a prefix and letters and digits drawn at random."""
    return prefix + "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(size))


def link(source: Path, target: Path) -> None:
    """Give a file's content a second name; where the file system has no hard links, copy it."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


class Store:
    """The database, and where contents lie. All methods may be called from any thread.

    Every method raises StoreError where the disk refuses.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or home()
        self._reserve = self.folder / "reserve"
        self._lock, self._reading = threading.RLock(), threading.Lock()
        self._changing: int | None = None  # the thread inside `change`
        with reported(self.folder):
            (self.folder / "files").mkdir(parents=True, exist_ok=True)
            (self.folder / "jobs").mkdir(exist_ok=True)
            file, options = self.folder / "endpoint.sqlite3", {"timeout": 30, "isolation_level": None}
            self._db, self._reader = (
                sqlite3.connect(file, check_same_thread=False, **options) for _ in range(2)
            )
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(SCHEMA)
        with contextlib.suppress(OSError):
            if not self._reserve.exists():
                self._reserve.write_bytes(bytes(RESERVE))

    def close(self) -> None:
        """Close the database."""
        with self._lock, self._reading:
            self._db.close()
            self._reader.close()

    def use_reserve(self) -> None:
        """Free the space that is kept back for what must be written on a full disk."""
        with contextlib.suppress(OSError):
            self._reserve.unlink()

    @contextmanager
    def change(self) -> Iterator[None]:
        """A transaction: what is done inside is done wholly or not at all. One in another is part of it."""
        with self._lock:
            if self._db.in_transaction:
                yield
                return
            with reported(self.folder):
                self._db.execute("BEGIN IMMEDIATE")
                self._changing = threading.get_ident()
                try:
                    yield
                    self._db.execute("COMMIT")
                except BaseException:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                    raise
                finally:
                    self._changing = None

    def _do(self, sql: str, *values: Any) -> int:
        with self.change():
            return self._db.execute(sql, values).rowcount

    def _rows(self, sql: str, *values: Any) -> list[tuple]:
        if self._changing == threading.get_ident():
            return self._db.execute(sql, values).fetchall()
        with self._reading, reported(self.folder):  # never waits for a change, which may wait for the disk
            return self._reader.execute(sql, values).fetchall()

    def _object(self, table: str, id: str) -> dict | None:
        found = self._rows(f"SELECT object FROM {table} WHERE id = ?", id)
        return json.loads(found[0][0]) if found else None

    def _page(
        self,
        table: str,
        where: Sequence[str],
        values: Sequence[Any],
        after: str | None,
        limit: int,
        ascending: bool = False,
    ) -> dict:
        """A list: at most `limit` objects behind the one with id `after`; LookupError where there is none."""
        if after is not None:
            place = self._rows(f"SELECT number FROM {table} WHERE id = ?", after)
            if not place:
                raise LookupError(after)
            where, values = [*where, f"number {'>' if ascending else '<'} ?"], [*values, place[0][0]]
        rows = self._rows(
            f"SELECT id, object FROM {table} WHERE {' AND '.join(where) or 'TRUE'} "
            f"ORDER BY number {'ASC' if ascending else 'DESC'} LIMIT ?",
            *values,
            limit + 1,
        )
        shown = rows[:limit]
        return {
            "object": "list",
            "data": [json.loads(found) for _, found in shown],
            "has_more": len(rows) > limit,
            "first_id": shown[0][0] if shown else None,
            "last_id": shown[-1][0] if shown else None,
        }

    # --- files ----------------------------------------------------------------------------------------------

    def content(self, file_id: str) -> Path:
        """Where a file's content lies."""
        return self.folder / "files" / file_id

    def add_file(self, file: dict) -> None:
        """Remember a file whose content is in its place; one with the same id is replaced."""
        self._do(
            "INSERT OR REPLACE INTO files (id, purpose, object) VALUES (?, ?, ?)",
            file["id"],
            file["purpose"],
            json.dumps(file),
        )

    def file(self, file_id: str) -> dict | None:
        """A file's object."""
        return self._object("files", file_id)

    def files(self, purpose: str | None, after: str | None, limit: int, ascending: bool) -> dict:
        """A page of files."""
        where = [] if purpose is None else ["purpose = ?"]
        return self._page("files", where, [purpose][: len(where)], after, limit, ascending)

    def delete_file(self, file_id: str) -> bool:
        """Forget a file and remove its content; False where there is none."""
        known = self._do("DELETE FROM files WHERE id = ?", file_id) > 0
        if known:
            with reported(self.folder):
                self.content(file_id).unlink(missing_ok=True)
        return known

    def sweep(self, age: float = 3600) -> None:
        """Remove what a killed process left half made: contents and job folders that nothing names.

        age: seconds that it must have lain there, since another process may be about to name it.
        """
        named = {id for table in ("files", "jobs") for (id,) in self._rows(f"SELECT id FROM {table}")}
        with reported(self.folder):
            for path in [*(self.folder / "files").iterdir(), *(self.folder / "jobs").iterdir()]:
                if path.name in named or time.time() - path.stat().st_mtime < age:
                    continue
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    # --- jobs -----------------------------------------------------------------------------------------------

    def job_folder(self, job_id: str) -> Path:
        """Where a job's data, its log and its checkpoints lie."""
        return self.folder / "jobs" / job_id

    def add_job(self, job: dict) -> None:
        """Remember a new job."""
        self._do(
            "INSERT INTO jobs (id, status, object) VALUES (?, ?, ?)",
            job["id"],
            job["status"],
            json.dumps(job),
        )

    def job(self, job_id: str) -> dict | None:
        """A job's object."""
        return self._object("jobs", job_id)

    def jobs(self, metadata: dict[str, str] | None, after: str | None, limit: int) -> dict:
        """A page of jobs, the newest first. metadata: what theirs must contain; None: that they have none."""
        if metadata is None:
            return self._page("jobs", ["json_extract(object, '$.metadata') IS NULL"], [], after, limit)
        holds = "EXISTS (SELECT 1 FROM json_each(object, '$.metadata') WHERE key = ? AND value = ?)"
        values = [part for pair in metadata.items() for part in pair]
        return self._page("jobs", [holds] * len(metadata), values, after, limit)

    def update_job(self, job_id: str, among: Iterable[str], **fields: Any) -> dict | None:
        """Change fields of a job if its status is one of `among`; else change nothing, and return None."""
        with self.change():
            job = self.job(job_id)
            if job is None or job["status"] not in among:
                return None
            job |= fields
            self._do(
                "UPDATE jobs SET status = ?, object = ? WHERE id = ?", job["status"], json.dumps(job), job_id
            )
            return job

    def next_job(self, status: str) -> dict | None:
        """The oldest job of a status."""
        found = self._rows("SELECT object FROM jobs WHERE status = ? ORDER BY number LIMIT 1", status)
        return json.loads(found[0][0]) if found else None

    def busy(self) -> bool:
        """Whether a job waits or runs."""
        return any(self.next_job(status) for status in ACTIVE)

    # --- events ---------------------------------------------------------------------------------------------

    def add_event(
        self,
        job_id: str,
        key: str,
        message: str,
        *,
        level: str = "info",
        type: str = "message",
        data: dict | None = None,
        at: float | None = None,
    ) -> bool:
        """Remember an event of a job; False, and nothing changed, where the job has one with this key."""
        event = {
            "object": "fine_tuning.job.event",
            "id": new_id("ftevent-"),
            "created_at": int(time.time() if at is None else at),
            "level": level,
            "message": message,
            "type": type,
            "data": data or {},
        }
        return bool(
            self._do(
                "INSERT INTO events (id, job, key, object) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (job, key) DO NOTHING",
                event["id"],
                job_id,
                key,
                json.dumps(event),
            )
        )

    def events(self, job_id: str, after: str | None, limit: int) -> dict:
        """A page of a job's events, the newest first."""
        return self._page("events", ["job = ?"], [job_id], after, limit)

    def metrics(self, job_id: str) -> list[dict]:
        """The data of a job's metric events, the oldest first."""
        rows = self._rows("SELECT object FROM events WHERE job = ? ORDER BY number", job_id)
        events = (json.loads(found) for (found,) in rows)
        return [event["data"] for event in events if event["type"] == "metrics"]

    # --- models and checkpoints -----------------------------------------------------------------------------

    def add_model(self, name: str, job_id: str, base: str, adapter: Path) -> None:
        """Remember a fine-tuned model. adapter: its GGUF file, inside the companion's home."""
        model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "personal"}
        self._do(
            "INSERT INTO models (id, job, base, adapter, object) VALUES (?, ?, ?, ?, ?)",
            name,
            job_id,
            base,
            adapter.relative_to(self.folder).as_posix(),
            json.dumps(model | {"shutdown_date": None}),
        )

    def model(self, name: str) -> TunedModel | None:
        """A fine-tuned model."""
        return next(iter(self._models("id", name)), None)

    def models_of(self, job_id: str) -> list[TunedModel]:
        """The models that a job made: its checkpoints, and the last."""
        return self._models("job", job_id)

    def _models(self, column: str, value: str) -> list[TunedModel]:
        rows = self._rows(f"SELECT id, job, base, adapter FROM models WHERE {column} = ?", value)
        return [TunedModel(name, job, base, self.folder / adapter) for name, job, base, adapter in rows]

    def models(self) -> list[dict]:
        """The objects of all fine-tuned models, the oldest first."""
        return [json.loads(found) for (found,) in self._rows("SELECT object FROM models ORDER BY number")]

    def forget_model(self, name: str) -> None:
        """Forget a model, and the checkpoint that it is."""
        with self.change():
            self._do("DELETE FROM models WHERE id = ?", name)
            self._do("DELETE FROM checkpoints WHERE model = ?", name)

    def add_checkpoint(self, checkpoint: dict) -> None:
        """Remember a checkpoint; its model is added besides."""
        self._do(
            "INSERT INTO checkpoints (id, job, model, object) VALUES (?, ?, ?, ?)",
            checkpoint["id"],
            checkpoint["fine_tuning_job_id"],
            checkpoint["fine_tuned_model_checkpoint"],
            json.dumps(checkpoint),
        )

    def checkpoints(self, job_id: str, after: str | None, limit: int) -> dict:
        """A page of a job's checkpoints, the newest first."""
        return self._page("checkpoints", ["job = ?"], [job_id], after, limit)
