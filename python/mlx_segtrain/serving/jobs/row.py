"""A job, as it is stored."""

import json
from dataclasses import dataclass
from typing import Any, Literal

from ...config import PATHS
from ...errors import Fault
from .kinds import JobKind, kind_of

Status = Literal["queued", "running", "done", "failed", "cancelled"]
#: The statuses of jobs that have ended.
ENDED = ("done", "failed", "cancelled")


@dataclass(frozen=True)
class Row:
    """A job. Times are UTC, "YYYY-MM-DD HH:MM:SS"; progress is 0..1."""

    id: str
    place: int
    kind: str
    status: Status
    config_json: str
    output_path: str | None
    progress: float
    message: str | None
    error: str | None
    result_json: str | None
    created_at: str
    started_at: str | None
    ended_at: str | None
    begins: int
    cancelling: int
    opened: int
    fault: Fault | None
    fault_field: str | None
    label: str
    note: str
    tags_json: str

    @property
    def job_kind(self) -> JobKind:
        return kind_of(self.kind)

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    @property
    def values(self) -> dict[str, Any]:
        """The configuration; empty in rows for lists."""
        return json.loads(self.config_json or "{}")

    @property
    def result(self) -> Any:
        """The result from its last event."""
        return json.loads(self.result_json or "null")

    @property
    def tags(self) -> list[str]:
        """The tags that people gave it."""
        return json.loads(self.tags_json)

    @property
    def method(self) -> str | None:
        """The method whose loss or reward the job measures; None if it measures none."""
        return self.values.get("method", "sft") if self.job_kind.measures else None

    @property
    def name(self) -> str:
        """A short description of its inputs."""
        return self.job_kind.named(self.values)

    @property
    def inputs(self) -> list[str]:
        """The folders that it reads."""
        found: list[str] = []
        for name in dict.fromkeys((*PATHS, *self.job_kind.folders)):
            given = self.values.get(name)
            found += given if isinstance(given, list) else [given or ""]
        return [path for path in found if path not in ("", self.output_path)]
