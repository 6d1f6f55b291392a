"""Prepares the recipes' model and data: `python -m mlx_segtrain.commands.demo DIR [sums]`.

It writes train.jsonl and valid.jsonl to DIR, and prints the folder of the demo's model. The files
contain preference pairs or, with the argument `sums`, prompts about sums.
"""

import sys
from pathlib import Path

from mlx_segtrain.commands.demo.docstrings import write_preferences
from mlx_segtrain.commands.demo.snapshot import smollm2_snapshot
from mlx_segtrain.commands.demo.sums import write_sums
from mlx_segtrain.files import cache_dir

write = write_sums if sys.argv[2:] == ["sums"] else write_preferences
write(Path(sys.argv[1]))
print(smollm2_snapshot(cache_dir()))
