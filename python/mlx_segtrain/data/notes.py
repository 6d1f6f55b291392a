"""The findings and counts that a run reports about its data."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

#: Findings about a turn in the loss. Each text completes a sentence that begins with a count.
FINDINGS = {
    "text": "text of the row is missing from the chat template's output",
    "reasoning": "reasoning of the row is missing from the chat template's output",
    "call": "a tool call of the row is missing or mangled in the chat template's output",
    "result": "a tool result of the row is missing from the chat template's output",
    "tools": "a tool definition of the row is missing from the chat template's output",
    "special": (
        "a message contains the text of a special token, which the model reads as that token"
    ),
    "stop": "the turn does not end with a stop token",
}
#: The maximum number of rows to list for each finding.
MOST_NAMED = 20


@dataclass
class Notes:
    """Counts over the rows of one source.

    `rows`, `samples` and `turns` (in the loss) are totals. `findings` counts samples by finding,
    and `where` lists the first rows with each finding. `ignored` counts, for each unused key, the
    rows that have it; `repeated` counts pairs in which both responses repeat the prompt; `unwanted`
    counts rows whose label is false; and `formats` counts rows by format. If there are plain
    prompts, `prompt_format` is chat or raw.
    """

    rows: int = 0
    samples: int = 0
    turns: int = 0
    findings: Counter[str] = field(default_factory=Counter)
    where: dict[str, list[str]] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)
    repeated: int = 0
    unwanted: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    prompt_format: str | None = None

    def add(self, other: "Notes") -> None:
        """Adds the counts of other rows, except the counts of samples and turns."""
        self.rows += other.rows
        self.ignored += other.ignored
        self.repeated += other.repeated
        self.unwanted += other.unwanted
        self.formats += other.formats
        self.prompt_format = other.prompt_format or self.prompt_format

    def of_rows(self) -> dict[str, Any]:
        """Returns the fields that `add` adds, in the JSON form that `Notes.read` expects."""
        names = ("rows", "ignored", "repeated", "unwanted", "formats", "prompt_format")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def read(cls, values: dict[str, Any]) -> "Notes":
        counts = {name: Counter(values[name]) for name in ("ignored", "formats")}
        return cls(**{**values, **counts})

    def faults(self) -> list[str]:
        """Returns one sentence for each finding, with the number of samples that have it and the
        first of these samples."""
        return [
            f"in {count:,} of {self.samples:,} samples {FINDINGS[name]} (first: "
            f"{self.where[name][0]})"
            for name, count in sorted(self.findings.items())
        ]

    def left_out(self) -> list[str]:
        """Returns sentences about the parts of rows that are not used."""
        said = [
            f'the column "{name}" of {count:,} rows is ignored'
            for name, count in self.ignored.most_common(10)
        ]
        if self.repeated:
            said.append(f"in {self.repeated:,} pairs both sides repeat the prompt: it is used once")
        if self.unwanted:
            said.append(f"{self.unwanted:,} rows with the label false are dropped")
        return said

    def as_json(self) -> dict[str, Any]:
        """Returns the values for metrics.json."""
        return {
            "rows": self.rows,
            "samples": self.samples,
            "trained_turns": self.turns,
            "findings": {
                name: {"samples": count, "rows": self.where[name]}
                for name, count in self.findings.items()
            },
            "ignored_columns": dict(self.ignored),
            "repeated_prompts": self.repeated,
            "rows_labelled_false": self.unwanted,
            "formats": dict(self.formats),
            "prompt_format": self.prompt_format,
        }
