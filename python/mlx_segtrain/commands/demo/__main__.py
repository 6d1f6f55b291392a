"""What recipes/dpo.sh and recipes/kto.sh need: `python -m mlx_segtrain.commands.demo DIR`.

It prints where the demo's model is; DIR gets pairs to train on, train.jsonl and valid.jsonl.
"""

import sys
from pathlib import Path

from mlx_segtrain.commands.demo.docstrings import write_preferences
from mlx_segtrain.commands.demo.snapshot import smollm2_snapshot
from mlx_segtrain.files import cache_dir

write_preferences(Path(sys.argv[1]))
print(smollm2_snapshot(cache_dir()))
