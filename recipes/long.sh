#!/usr/bin/env bash
# Shows how much memory and time a context length needs, by printing the memory plan for several budgets. Nothing is
# trained, and no weights are loaded.
#   recipes/long.sh                                         SmolLM2-135M at 8192 tokens
#   MODEL=org/name SEQ=32768 BUDGETS="24 8 4" recipes/long.sh [FLAG ...]
# You can append flags of `mlx-segtrain plan`, which take precedence.
set -euo pipefail
source "$(dirname "$0")/knobs.sh"
MODEL=${MODEL:-$(demo_model)}
for budget in ${BUDGETS:-10 2 0.5}; do
  echo "With $budget GB:"
  mlx-segtrain plan --model "$MODEL" --max-seq-length "${SEQ:-8192}" --rank "${RANK:-16}" \
    --memory-budget-gb "$budget" "$@" || [ $? = 2 ] # exit status 2: the run does not fit, which the output explains
done
