#!/usr/bin/env bash
# Trains with DPO on pairs. Without DATA, it trains the demo's model on pairs that are generated from docstrings of
# Python's standard library.
#   MODEL=/path/to/model DATA=/path/to/pairs ITERS=60 RANK=16 recipes/dpo.sh [FLAG ...]
# You can append flags of `mlx-segtrain train`, which take precedence; for example, --overwrite replaces an adapter.
set -euo pipefail
recipe=$(cd "$(dirname "$0")" && pwd)/dpo
source "${recipe%/*}/knobs.sh"
demo_without_data preferences
knobs "$recipe" SmolLM2-135M-Instruct-4bit smollm2-dpo
exec mlx-segtrain train "${flags[@]}" "$@"
