#!/usr/bin/env bash
# Trains Gemma 4 E4B: first a probe, then the run. knobs.sh lists the environment variables that set options.
#   DATA=/path/to/rows recipes/e4b.sh probe     shows time, memory and loss of two steps on the longest rows; writes no files
#   DATA=/path/to/rows recipes/e4b.sh train     trains the adapter
#   ITERS=750 SEQ=4096 SEG=1 recipes/e4b.sh train
# You can append flags of `mlx-segtrain train`, which take precedence.
set -euo pipefail
case "${1:-}" in
  probe | train) ;;
  *) echo "usage: recipes/e4b.sh probe|train [FLAG ...]" >&2; exit 2 ;;
esac
recipe=$(cd "$(dirname "$0")" && pwd)/e4b
source "${recipe%/*}/knobs.sh"
knobs "$recipe" gemma-4-e4b-it-OptiQ-4bit e4b
exec mlx-segtrain "$1" "${flags[@]}" "${@:2}"
