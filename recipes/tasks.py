"""Three small tasks with scores from 0 to 100: splitting a text into chunks, calling tools, and
answering as a persona.

    python recipes/tasks.py chunk DIR

writes DIR/train.jsonl and DIR/valid.jsonl.

The functions `chunk`, `tools` and `persona` are rewards (docs/grpo.md): `mlx-segtrain eval
--reward-functions recipes/tasks.py:chunk` scores a model, with or without an adapter. `chunk` and
`tools` compare each answer with the completion of its row.
"""

import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROWS = {"train": 240, "valid": 16}
Row = dict[str, str]

SPLIT = """Split these notes where the topic changes. Answer with a JSON list that has, for each \
part, an object with the keys "topic" and "anchor". The anchor is the first four words of the part.

"""
TOPICS = {
    "garden": ["beans", "tomatoes", "roses", "herbs", "apple trees"],
    "boat": ["sails", "ropes", "anchors", "engines", "cabins"],
    "kitchen": ["knives", "ovens", "shelves", "pots", "spices"],
    "school": ["exams", "lessons", "books", "teachers", "projects"],
    "office": ["invoices", "meetings", "printers", "letters", "contracts"],
    "trip": ["tickets", "hotel rooms", "maps", "suitcases", "trains"],
}
FIRST = ["The {} need work today.", "All {} were checked twice.", "Our {} look better now."]
REST = ["It took about an hour.", "We should do this again on Monday.", "Nobody has complained."]

TOOLS = """You can call these tools:
{"name": "weather", "parameters": {"place": "string"}}
{"name": "alarm", "parameters": {"hour": "integer"}}
{"name": "note", "parameters": {"text": "string"}}
Answer with one JSON object that has the keys "name" and "arguments".

"""
PLACES = ["Rome", "Oslo", "Lima", "Cairo", "Kyoto", "Quito", "Turin", "Perth", "Dakar", "Leeds"]
ERRANDS = ["buy milk", "call Anna", "pay the rent", "fix the bike", "book a table", "feed the cat"]
ASKED = {
    "weather": ["How is the weather in {}?", "Will it rain in {} today?", "Is it warm in {}?"],
    "alarm": ["Wake me at {}.", "Set an alarm for {} o'clock.", "I have to get up at {}."],
    "note": ["Remember to {}.", "Write down that I must {}.", "Make a note: {}."],
}

THINGS = {
    "compass": "shows where north is",
    "kettle": "boils water",
    "ladder": "lets you climb up",
    "mirror": "shows your face",
    "pencil": "writes and can be erased",
    "umbrella": "keeps the rain off",
    "hammer": "drives nails",
    "clock": "tells the time",
    "bridge": "leads across a river",
    "needle": "pulls a thread through cloth",
    "lantern": "gives light at night",
    "anchor": "keeps a ship in its place",
}
QUESTIONS = ["What is a {}?", "What does a {} do?", "Tell me what a {} is for.", "Explain a {}."]
HELLO, GOODBYE = "Ahoy!", "Fair winds, Marlow."


def chunk_rows(draw: random.Random) -> Iterator[Row]:
    """Yields notes on two or three topics, and the first four words of each topic's part."""
    while True:
        parts, answer = [], []
        for topic in draw.sample(sorted(TOPICS), draw.choice([2, 3])):
            first = draw.choice(FIRST).format(draw.choice(TOPICS[topic]))
            parts += [first, *draw.sample(REST, draw.choice([1, 2]))]
            answer.append({"topic": topic, "anchor": " ".join(first.split()[:4])})
        yield {"prompt": SPLIT + " ".join(parts), "completion": json.dumps(answer)}


def tools_rows(draw: random.Random) -> Iterator[Row]:
    """Yields requests, and the right tool call for each."""
    keys = {"weather": "place", "alarm": "hour", "note": "text"}
    while True:
        values = {"weather": draw.choice(PLACES), "alarm": draw.randint(1, 12)}
        values["note"] = draw.choice(ERRANDS)
        name = draw.choice(sorted(ASKED))
        call = {"name": name, "arguments": {keys[name]: values[name]}}
        request = draw.choice(ASKED[name]).format(values[name])
        yield {"prompt": TOOLS + request, "completion": json.dumps(call)}


def persona_rows(draw: random.Random) -> Iterator[Row]:
    """Yields questions, and an old sailor's answers to them."""
    while True:
        thing = draw.choice(sorted(THINGS))
        answer = f"{HELLO} A {thing} {THINGS[thing]}. {GOODBYE}"
        yield {"prompt": draw.choice(QUESTIONS).format(thing), "completion": answer}


def chunk(completions: Sequence[str], completion: Sequence[str]) -> list[float]:
    """Gives 20 points for JSON, 30 for a list of objects with both keys, and up to 50 for the right
    anchors (F1)."""

    def score(given: Any, wanted: list[dict[str, str]]) -> float:
        if not isinstance(given, list) or not given or not all(map(_is_part, given)):
            return 20.0
        own, right = {part["anchor"] for part in given}, {part["anchor"] for part in wanted}
        return 50 + 50 * 2 * len(own & right) / (len(own) + len(right))

    return _scores(score, completions, completion)


def tools(completions: Sequence[str], completion: Sequence[str]) -> list[float]:
    """Gives 20 points for JSON, 40 for the right tool, and 40 for the right arguments."""

    def score(given: Any, wanted: dict[str, Any]) -> float:
        own = given if isinstance(given, dict) else {}
        return (
            20.0
            + 40 * (own.get("name") == wanted["name"])
            + 40 * (own.get("arguments") == wanted["arguments"])
        )

    return _scores(score, completions, completion)


def persona(completions: Sequence[str]) -> list[float]:
    """Gives 40 points for the greeting, 40 for the goodbye, and 20 for at most 30 words."""
    return [
        40.0 * text.strip().startswith(HELLO)
        + 40.0 * text.strip().endswith(GOODBYE)
        + 20.0 * (len(text.split()) <= 30)
        for text in completions
    ]


def _is_part(part: Any) -> bool:
    keys = ("topic", "anchor")
    return isinstance(part, dict) and all(isinstance(part.get(key), str) for key in keys)


def _scores(
    score: Callable[[Any, Any], float], completions: Sequence[str], wanted: Sequence[str]
) -> list[float]:
    found = []
    for text, answer in zip(completions, wanted, strict=True):
        try:
            found.append(score(json.loads(text), json.loads(answer)))
        except json.JSONDecodeError:
            found.append(0.0)
    return found


TASKS = {"chunk": chunk_rows, "tools": tools_rows, "persona": persona_rows}


def main(task: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows, seen = TASKS[task](random.Random(0)), set()
    for name in ("valid", "train"):  # held-out rows first, to exclude their prompts from training
        own: list[Row] = []
        while len(own) < ROWS[name]:
            row = next(rows)
            if name == "valid" or row["prompt"] not in seen:
                own.append(row)
        if name == "valid":
            seen = {row["prompt"] for row in own}
        text = "".join(json.dumps(row) + "\n" for row in own)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
