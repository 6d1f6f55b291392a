#!/usr/bin/env bash
# Runs a task: scores the model from 0 to 100, trains an adapter, and then scores the model with the adapter.
#   recipes/task.sh chunk       split notes into chunks, given as JSON with anchors
#   recipes/task.sh tools       call the right tool with the right arguments
#   recipes/task.sh persona     answer as an old sailor
#   MODEL=/path/to/model ITERS=80 recipes/task.sh tools [FLAG ...]
# tasks.py generates the rows and computes the scores. You can append flags of `mlx-segtrain train`, which take
# precedence; for example, --overwrite replaces an adapter.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source "$here/knobs.sh"
case "${1:-}" in
  chunk | tools | persona) task=$1 ;;
  *) echo "usage: recipes/task.sh chunk|tools|persona [FLAG ...]" >&2; exit 2 ;;
esac
DATA=${DATA:-$HOME/.cache/mlx-segtrain/data/$task}
[ -e "$DATA" ] || python3 "$here/tasks.py" "$task" "$DATA"
MODEL=${MODEL:-$(demo_model)}
knobs "$here/task" SmolLM2-135M-Instruct-4bit "smollm2-$task"

# Scores two completions for each held-out row, at a temperature so low that decoding is nearly greedy.
score() {
  mlx-segtrain eval --model "$MODEL" --data "$DATA" --reward-functions "$here/tasks.py:$task" --pass-reward 100 \
    --group-size 2 --temperature 0.05 --max-completion-tokens 96 --max-seq-length 512 "$@"
}
echo "Before training:"
score
mlx-segtrain train "${flags[@]}" "${@:2}"
echo "After training:"
score --adapter-path "${flags[7]}"
