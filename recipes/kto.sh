#!/usr/bin/env bash
# Trains with KTO on labelled rows, or on pairs, each of which becomes two rows. Without DATA, it uses the same model
# and pairs as dpo.sh.
#   MODEL=/path/to/model DATA=/path/to/rows ITERS=40 RANK=16 recipes/kto.sh [FLAG ...]
# You can append flags of `mlx-segtrain train`, which take precedence; for example, --overwrite replaces an adapter.
set -euo pipefail
recipe=$(cd "$(dirname "$0")" && pwd)/kto
source "${recipe%/*}/knobs.sh"
demo_without_data preferences
knobs "$recipe" SmolLM2-135M-Instruct-4bit smollm2-kto
exec mlx-segtrain train "${flags[@]}" "$@"
