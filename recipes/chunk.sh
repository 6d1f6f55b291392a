#!/usr/bin/env bash
# Fine-tunes on text that is divided into chunks. knobs.sh lists the environment variables that set options.
#   DATA=/path/to/chunk ITERS=300 RANK=16 SEQ=2048 SEG=4 recipes/chunk.sh [FLAG ...]
# You can append flags of `mlx-segtrain train`, which take precedence; for example, --overwrite replaces an adapter.
set -euo pipefail
recipe=$(cd "$(dirname "$0")" && pwd)/chunk
source "${recipe%/*}/knobs.sh"
knobs "$recipe" MiniCPM5-1B-OptiQ-4bit minicpm5-chunk
exec mlx-segtrain train "${flags[@]}" "$@"
