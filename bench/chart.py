"""Plots the time and memory of a step against the context length, using the data in bench/LOG.md.

python bench/chart.py [--out docs/performance.svg]

The data is in the newest block that begins with ```csv. Its columns are model, tokens, trainer, ms
and GB (empty if unknown). The chart has one line per trainer.
"""

import argparse
import csv
import io
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
COLUMNS = ["model", "tokens", "trainer", "ms", "gb"]


def rows_of(log: str) -> list[dict[str, str]]:
    """Returns the rows of the first block of data in the log, which is the newest block."""
    _, found, rest = log.partition("```csv\n")
    if not found:
        raise SystemExit("bench/LOG.md has no block that begins with ```csv.")
    rows = list(csv.DictReader(io.StringIO(rest.partition("```")[0])))
    if not rows or list(rows[0]) != COLUMNS:
        raise SystemExit(f"the block in bench/LOG.md must have the columns {', '.join(COLUMNS)}.")
    return rows


def draw(rows: list[dict[str, str]], out: Path) -> None:
    from matplotlib import rcParams
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    rcParams["svg.hashsalt"] = "performance"  # makes the file depend only on the data
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(9, 3.6 * len(models)), layout="constrained")
    axes = figure.subplots(len(models), 2, squeeze=False)
    for model, (time, memory) in zip(models, axes, strict=True):
        lines = defaultdict(list)
        for row in rows:
            if row["model"] == model:
                point = int(row["tokens"]), float(row["ms"]), float(row["gb"] or "nan")
                lines[row["trainer"]].append(point)
        for trainer, points in lines.items():
            tokens, ms, gb = zip(*sorted(points), strict=True)
            ours = trainer.startswith("mlx_segtrain")
            style = {"marker": "o", "linewidth": 2.2 if ours else 1.2}
            style |= {} if ours else {"linestyle": "--"}
            time.plot(tokens, [x / 1000 for x in ms], label=trainer, **style)
            memory.plot(tokens, gb, label=trainer, **style)
        for axis, label in ((time, "seconds per step"), (memory, "peak memory, GB")):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", base=2)
            for ticks in (axis.xaxis, axis.yaxis):
                ticks.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.set_xlabel("tokens per row")
            axis.set_ylabel(label)
            axis.set_title(model, fontsize=10)
            axis.grid(alpha=0.3)
        time.legend(fontsize=8)
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws the chart of docs/performance.md.")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "performance.svg")
    args = parser.parse_args()
    draw(rows_of((ROOT / "bench" / "LOG.md").read_text()), args.out)


if __name__ == "__main__":
    main()
