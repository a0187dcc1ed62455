#!/usr/bin/env bash
# The extraction on a TPU slice of a GKE cluster that xpk made; xpk writes the JobSet, one pod for each host.
#
#   launchers/xpk.sh --cluster CLUSTER --docker-image IMAGE --tpu-type v5litepod-64 --spot \
#       -- --dataset_path gs://your-bucket/streams/stream_000.jsonl --upload_to_gcs --gcs_bucket your-bucket
#
# Flags before -- go to `xpk workload create`, flags after it to extract_activations.py.
set -euo pipefail

xpk_flags=()
while (($#)) && [[ $1 != -- ]]; do
    xpk_flags+=("$1")
    shift
done
(($# > 1)) || {
    echo "error: the flags of extract_activations.py are missing after --" >&2
    exit 2
}
shift

# GKE numbers the hosts of a slice, and JAX reads that number; WORKER_ID distinguishes slices.
printf -v command '%q ' python extract_activations.py --multihost --worker_id "${WORKER_ID:-0}" "$@"
# xpk restarts a slice after exit codes of 127 and above. Exit code 1 is a crash too; only 2 (wrong flags) is final.
exec xpk workload create --workload "activations-${WORKER_ID:-0}" --num-slices 1 --max-restarts 100 \
    --restart-on-exit-codes 1 "${xpk_flags[@]}" --command "$command"
