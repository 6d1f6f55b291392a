"""A job, as it is stored in the database."""

import json
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, Field

from ...config import PATHS
from ...errors import Fault
from .kinds import JobKind, kind_of

Status = Literal["queued", "running", "done", "failed", "cancelled"]
#: The statuses of jobs that have ended.
ENDED = ("done", "failed", "cancelled")


class RankFigures(BaseModel):
    """The figures of a rank: means per step since the previous report, and its memory."""

    busy_s: float = Field(description="Seconds that the rank spent working.")
    waited_s: float = Field(description="Seconds that the rank spent waiting for others.")
    tokens_per_sec: float = Field(description="The rank's speed while it worked.")
    peak_gb: float
    active_gb: float


class Figures(BaseModel):
    """The figures of a run's ranks from the run's latest report (events.with_ranks)."""

    step: int
    skew_s: float = Field(description="busy_s of the slowest rank minus that of the fastest.")
    slowest: int = Field(description="The rank for which the others wait.")
    ranks: list[RankFigures] = Field(description="The figures of each rank.")


@dataclass(frozen=True)
class Row:
    """A job. Times are UTC in the format "YYYY-MM-DD HH:MM:SS"; progress is from 0 to 1."""

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
    ranks_json: str | None

    @property
    def job_kind(self) -> JobKind:
        return kind_of(self.kind)

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    @property
    def values(self) -> dict[str, Any]:
        """The configuration. It is empty in rows that were read for a list of jobs."""
        return json.loads(self.config_json or "{}")

    @property
    def result(self) -> Any:
        """The result in the job's last event."""
        return json.loads(self.result_json or "null")

    @property
    def tags(self) -> list[str]:
        """The tags that users gave the job."""
        return json.loads(self.tags_json)

    @property
    def ranks(self) -> Figures | None:
        """The latest figures of the job's ranks; None if the job has only one process."""
        return None if self.ranks_json is None else Figures.model_validate_json(self.ranks_json)

    @property
    def method(self) -> str | None:
        """The method whose loss or reward the job measures; None if the job measures neither."""
        return self.values.get("method", "sft") if self.job_kind.measures else None

    @property
    def name(self) -> str:
        """A short description of the job's inputs."""
        return self.job_kind.named(self.values)

    @property
    def inputs(self) -> list[str]:
        """The folders that the job reads."""
        found: list[str] = []
        for name in dict.fromkeys((*PATHS, *self.job_kind.folders)):
            given = self.values.get(name)
            found += given if isinstance(given, list) else [given or ""]
        return [path for path in found if path not in ("", self.output_path)]
