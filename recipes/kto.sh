#!/usr/bin/env bash
# Trains with KTO on rows with a label, or on pairs, each of which becomes two rows. Without DATA, it uses the model and
# the pairs of dpo.sh.
#   MODEL=/path/to/model DATA=/path/to/rows ITERS=40 RANK=16 recipes/kto.sh [FLAG ...]
# Flags of `mlx-segtrain train` come last and take precedence; for example, --overwrite replaces an adapter.
set -euo pipefail
recipe=$(cd "$(dirname "$0")" && pwd)/kto
source "${recipe%/*}/knobs.sh"
demo_without_data preferences
knobs "$recipe" SmolLM2-135M-Instruct-4bit smollm2-kto
exec mlx-segtrain train "${flags[@]}" "$@"
