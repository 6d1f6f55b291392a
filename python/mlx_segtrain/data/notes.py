"""What a run says about its data: what was left out, and what the chat template does to rows."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from .chat import Sample

#: Findings about a trained turn, as the end of a sentence that begins with their count.
FINDINGS = {
    "text": "text of the row is missing from what the chat template renders",
    "reasoning": "reasoning of the row is missing from what the chat template renders",
    "call": "a tool call of the row is missing or mangled in what the chat template renders",
    "result": "a tool result of the row is missing from what the chat template renders",
    "tools": "a tool definition of the row is missing from what the chat template renders",
    "special": "a message holds the text of a special token, which the model reads as that token",
    "stop": "no token that stops generation ends the turn",
}
#: Rows that are named for each finding.
MOST_NAMED = 20


@dataclass
class Notes:
    """Counts over one file.

    `rows` were read and gave `samples`, which have `turns` trained turns. `findings` counts samples
    by finding and `where` names the first of their rows; `ignored` counts rows by a key that
    nothing reads; `repeated` counts pairs whose sides began with the prompt again, `unwanted` rows
    whose label is false, `formats` rows by their form. `prompt_format` is chat or raw if there are
    plain prompts.
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

    def add(self, sample: Sample) -> None:
        """Counts a sample."""
        self.samples += 1
        self.turns += sample.turns
        self.findings.update(sample.findings)
        for name in sample.findings:
            named = self.where.setdefault(name, [])
            if len(named) < MOST_NAMED and sample.source not in named[-1:]:
                named.append(sample.source)

    def faults(self) -> list[str]:
        """A sentence for each finding, with its count and first row."""
        return [
            f"in {count:,} of {self.samples:,} samples {FINDINGS[name]} (first: "
            f"{self.where[name][0]})"
            for name, count in sorted(self.findings.items())
        ]

    def left_out(self) -> list[str]:
        """A sentence for whatever of the rows is not used."""
        said = [
            f'the column "{name}" of {count:,} rows is ignored'
            for name, count in self.ignored.most_common(10)
        ]
        if self.repeated:
            said.append(
                f"in {self.repeated:,} pairs both sides began with the prompt again: it is used "
                "once"
            )
        if self.unwanted:
            said.append(f"{self.unwanted:,} rows with a label of false are left out")
        return said

    def as_json(self) -> dict[str, Any]:
        """For metrics.json."""
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
