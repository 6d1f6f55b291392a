# Converts environment variables to flags of mlx-segtrain. If a variable is not set, the recipe's value applies.
#
#   MODEL       model_dir: a folder, or a name on the hub
#   DATA        data_dir: a folder with train.jsonl, or a name on the hub
#   SEQ         max_seq_length
#   ITERS       iters
#   RANK        rank
#   LR          learning_rate
#   SCALE       scale
#   SEG         segment_size: layers per segment, 0 for no segments, or auto
#   EVAL_EVERY  steps_per_eval; by default a fifth of ITERS if ITERS is set
#   ADAPTER     adapter_path
#   CKPT        save_checkpoints: 1 or 0
#   GRAD_CKPT   grad_checkpoint: 1 or 0

PATH="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin:$PATH"
command -v mlx-segtrain > /dev/null || { echo "mlx-segtrain is not on PATH: install it with pip, or run make dev." >&2; exit 2; }

# Prints the folder of a model in the Hugging Face cache. If there are several snapshots of the model, prints the newest.
cached() {
  local hub="${HF_HUB_CACHE:-${HF_HOME:-$HOME/.cache/huggingface}/hub}"
  ls -dt "$hub"/models--*--"$1"/snapshots/*/ 2> /dev/null | head -1 || true
}

# Prints the folder of the 4-bit SmolLM2-135M-Instruct, which is downloaded on first use.
demo_model() {
  python3 -c 'from mlx_segtrain.commands.demo.snapshot import smollm2_snapshot
from mlx_segtrain.files import cache_dir
print(smollm2_snapshot(cache_dir()))'
}

# If DATA is not set, generates rows and sets DATA to their folder. If MODEL is not set either, sets MODEL to the demo's
# model. The arguments are the name of the folder for the rows, and the kind of rows.
demo_without_data() {
  [ -z "${DATA:-}" ] || return 0
  DATA=$HOME/.cache/mlx-segtrain/data/$1
  local demo_model
  demo_model=$(python3 -m mlx_segtrain.commands.demo "$DATA" "${@:2}")
  MODEL=${MODEL:-$demo_model}
}

# Fills the array `flags`. The arguments are the path of the recipe without its extension, the name of its default
# model, and the name of the adapter without the context length.
knobs() {
  local name=$1 model=$2 adapter=$3
  local seq=${SEQ:-$(sed -n 's/^max_seq_length: *\([0-9]*\).*/\1/p' "$name.yaml")}
  MODEL=${MODEL:-$(cached "$model")}
  [ -n "$MODEL" ] || { echo "MODEL is not set, and no $model is in the Hugging Face cache: set it to the folder of a model." >&2; exit 2; }
  [ -n "${DATA:-}" ] || { echo "DATA is not set: set it to a folder with train.jsonl." >&2; exit 2; }
  flags=(--config "$name.yaml" --model "$MODEL" --data "$DATA"
         --adapter-path "${ADAPTER:-$HOME/.cache/mlx-segtrain/finetunes/$adapter-seq$seq}")
  [[ ! ${ITERS:-} =~ ^[0-9]+$ ]] || EVAL_EVERY=${EVAL_EVERY:-$((ITERS >= 5 ? ITERS / 5 : 1))}
  local pair
  for pair in SEQ:max-seq-length ITERS:iters RANK:rank LR:learning-rate SCALE:scale SEG:segment-size EVAL_EVERY:steps-per-eval; do
    local knob=${pair%%:*}
    [ -z "${!knob:-}" ] || flags+=("--${pair#*:}" "${!knob}")
  done
  for pair in CKPT:save-checkpoints GRAD_CKPT:grad-checkpoint; do
    local knob=${pair%%:*}
    case "${!knob:-}" in
      "") ;;
      0) flags+=("--no-${pair#*:}") ;;
      *) flags+=("--${pair#*:}") ;;
    esac
  done
}
