"""Stores jobs as rows of an SQLite table, for lists and the queue. A job's events are in its
log."""

import secrets
import sqlite3
from dataclasses import fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...files import make_folder, private
from .row import Row, Status

TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY,
    place INTEGER NOT NULL,        -- its position in the queue; the lowest is the next
    kind TEXT NOT NULL,
    status TEXT NOT NULL,
    config_json TEXT NOT NULL,
    output_path TEXT,
    progress REAL NOT NULL DEFAULT 0,
    message TEXT,
    error TEXT,
    result_json TEXT,
    created_at TEXT NOT NULL,
    started_at TEXT,
    ended_at TEXT,
    begins INTEGER NOT NULL DEFAULT 0,   -- the offset of the current attempt's events in the log
    cancelling INTEGER NOT NULL DEFAULT 0,
    opened INTEGER NOT NULL DEFAULT 0    -- whether output_path contains its run (queue.OPENED)
)
"""
#: Columns that tables of earlier versions lack.
ADDED = {
    "fault": "TEXT",  # errors.Fault, if the job failed
    "fault_field": "TEXT",  # the field of the configuration that has to be changed
    "label": "TEXT NOT NULL DEFAULT ''",  # a name that the user gave the job
    "note": "TEXT NOT NULL DEFAULT ''",
    "tags_json": "TEXT NOT NULL DEFAULT '[]'",
    "ranks_json": "TEXT",  # the latest figures of the job's ranks, if there are several
}
#: Indexes for lists and the queue. Without them, each query would read all jobs.
INDEXES = (
    "CREATE INDEX IF NOT EXISTS jobs_by_place ON jobs (place)",
    "CREATE INDEX IF NOT EXISTS jobs_by_kind ON jobs (kind, place)",
    "CREATE INDEX IF NOT EXISTS jobs_by_status ON jobs (status, place)",
)


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S")


class Store:
    """The table of jobs. When a method returns, its changes are on disk."""

    def __init__(self, file: Path):
        make_folder(file.parent)
        try:
            with open(file, "ab", opener=private):  # SQLite's journals inherit this mode
                file.chmod(0o600)
            self.connection = sqlite3.connect(file, isolation_level=None)
            self.connection.execute("PRAGMA journal_mode=WAL")
            self.connection.execute("PRAGMA synchronous=FULL")
            for statement in (TABLE, *INDEXES):
                self.connection.execute(statement)
            there = {row[1] for row in self.connection.execute("PRAGMA table_info(jobs)")}
            for name, kind in ADDED.items():
                if name not in there:
                    self.connection.execute(f"ALTER TABLE jobs ADD COLUMN {name} {kind}")
        except (sqlite3.Error, OSError) as error:
            raise InputError(
                f"the job database {file} cannot be used ({error}): move it elsewhere, or set "
                "MLX_SEGTRAIN_CACHE to another folder."
            ) from None
        self.connection.row_factory = lambda cursor, values: Row(*values)

    def close(self) -> None:
        self.connection.close()

    def add(self, kind: str, config_json: str, output_path: str | None) -> Row:
        """Adds a new job at the end of the queue."""
        id = f"job_{secrets.token_hex(8)}"
        self.connection.execute(
            "INSERT INTO jobs (id, place, kind, status, config_json, output_path, created_at)"
            f" VALUES (?, {_LAST}, ?, 'queued', ?, ?, ?)",
            (id, kind, config_json, output_path, now()),
        )
        row = self.get(id)
        assert row is not None
        return row

    def requeue(self, id: str, config_json: str) -> None:
        """Puts a job that has ended back in the queue, in last place."""
        self.connection.execute(
            f"UPDATE jobs SET place = {_LAST}, status = 'queued', config_json = ?, error = NULL,"
            " fault = NULL, fault_field = NULL, result_json = NULL, ended_at = NULL,"
            " cancelling = 0, ranks_json = NULL WHERE id = ?",
            (config_json, id),
        )

    def update(self, id: str, **values: Any) -> None:
        """Sets the given columns of a job."""
        names = ", ".join(f"{name} = ?" for name in values)
        self.connection.execute(f"UPDATE jobs SET {names} WHERE id = ?", (*values.values(), id))

    def replace_others(self, row: Row, opened: int) -> None:
        """Sets the column `opened` of all other jobs with the same output folder."""
        self.connection.execute(
            "UPDATE jobs SET opened = ? WHERE output_path = ? AND id != ?",
            (opened, row.output_path, row.id),
        )

    def remove(self, id: str) -> None:
        self.connection.execute("DELETE FROM jobs WHERE id = ?", (id,))

    def get(self, id: str) -> Row | None:
        return self.connection.execute(f"SELECT {_ALL} FROM jobs WHERE id = ?", (id,)).fetchone()

    def newest(self, limit: int, kind: str | None = None, before: int | None = None) -> list[Row]:
        """Returns jobs without their configurations, the newest first. With `before`, returns only
        jobs whose place in the queue is lower than `before`."""
        wanted = {"kind = ?": kind, "place < ?": before}
        given = {test: value for test, value in wanted.items() if value is not None}
        where = f"WHERE {' AND '.join(given)}" if given else ""
        return self.connection.execute(
            f"SELECT {_BRIEF} FROM jobs {where} ORDER BY place DESC LIMIT ?",
            (*given.values(), limit),
        ).fetchall()

    def with_status(self, status: Status) -> list[Row]:
        """Returns the jobs with this status in the order of the queue, without their
        configurations."""
        return self.connection.execute(
            f"SELECT {_BRIEF} FROM jobs WHERE status = ? ORDER BY place", (status,)
        ).fetchall()


_ALL = ", ".join(field.name for field in fields(Row))
_BRIEF = ", ".join("''" if field.name == "config_json" else field.name for field in fields(Row))
_LAST = "(SELECT COALESCE(MAX(place), 0) + 1 FROM jobs)"
