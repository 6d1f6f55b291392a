#!/usr/bin/env bash
# Trains with GRPO. Without DATA, it trains the demo's model to complete JSON records that contain a sum.
#   MODEL=/path/to/model DATA=/path/to/prompts ITERS=12 RANK=16 recipes/grpo.sh [FLAG ...]
# You can append flags of `mlx-segtrain train`, which take precedence; for example, --reward number:answer sets a
# different reward.
set -euo pipefail
recipe=$(cd "$(dirname "$0")" && pwd)/grpo
source "${recipe%/*}/knobs.sh"
demo_without_data sums sums
knobs "$recipe" SmolLM2-135M-Instruct-4bit smollm2-grpo
exec mlx-segtrain train "${flags[@]}" "$@"
