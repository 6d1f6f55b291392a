"""Sums in the form of incomplete JSON records. They are prompts whose completions can be
checked."""

import json
import random
from pathlib import Path

from mlx_segtrain.files import make_folder

#: The number of training rows and of held-out rows.
ROWS = {"train": 96, "valid": 48}


def write_sums(path: Path) -> None:
    """Writes train.jsonl and valid.jsonl, which have no sum in common. Each call writes the same
    rows."""
    make_folder(path)
    pairs = [(a, b) for a in range(1, 13) for b in range(1, 13)]
    random.Random(0).shuffle(pairs)
    for name, count in ROWS.items():
        own, pairs = pairs[:count], pairs[count:]
        rows = ({"prompt": f'{{"sum": "{a} + {b}", "answer":', "answer": a + b} for a, b in own)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (path / f"{name}.jsonl").write_text(text, encoding="utf-8")
