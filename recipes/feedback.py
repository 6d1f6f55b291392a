"""Turns feedback from users into training rows: `python recipes/feedback.py FEEDBACK.csv DIR`.

FEEDBACK.csv has the columns prompt, answer and good (true or false). If a prompt has both good and
bad answers, each good answer is paired with each bad answer, and the pairs are written to
DIR/pairs, for method dpo. The answers to all other prompts are written to DIR/labels, for method
kto.
"""

import csv
import itertools
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def main(feedback: Path, folder: Path) -> None:
    answers: dict[str, dict[bool, list[str]]] = {}
    with feedback.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file), 1):
            good = WORDS.get((row.get("good") or "").strip().lower())
            if good is None or not row.get("prompt") or not row.get("answer"):
                sys.exit(
                    f"{feedback}, row {number}: prompt and answer must not be empty, and good must "
                    "be true or false"
                )
            answers.setdefault(row["prompt"], {True: [], False: []})[good].append(row["answer"])
    pairs, labels, equal = [], [], 0
    for prompt, own in answers.items():
        both = list(itertools.product(own[True], own[False]))
        pairs += [{"prompt": prompt, "chosen": a, "rejected": b} for a, b in both if a != b]
        equal += sum(a == b for a, b in both)
        if not both:
            rows = [(text, good) for good in own for text in own[good]]
            labels += [{"prompt": prompt, "completion": a, "label": good} for a, good in rows]
    for name, rows in (("pairs", pairs), ("labels", labels)):
        print(f"{name}: {write(folder / name, rows)} rows")
    if equal:
        print(f"left out: {equal} pairs of equal answers, one rated good and the other bad")


def write(folder: Path, rows: Iterable[dict[str, Any]]) -> int:
    lines = [json.dumps(row) + "\n" for row in rows]
    if lines:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    return len(lines)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python recipes/feedback.py FEEDBACK.csv DIR")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
