#!/usr/bin/env bash
# Trains with GRPO. Without DATA, it trains the demo's model to complete JSON records that contain a sum.
#   MODEL=/path/to/model DATA=/path/to/prompts ITERS=12 RANK=16 recipes/grpo.sh [FLAG ...]
# Flags of `mlx-segtrain train` come last and take precedence; for example, --reward number:answer sets another reward.
set -euo pipefail
recipe=$(cd "$(dirname "$0")" && pwd)/grpo
source "${recipe%/*}/knobs.sh"
demo_without_data sums sums
knobs "$recipe" SmolLM2-135M-Instruct-4bit smollm2-grpo
exec mlx-segtrain train "${flags[@]}" "$@"
