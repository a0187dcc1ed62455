#!/usr/bin/env bash
# The extraction on a TPU slice of a GKE cluster that xpk made; xpk writes the JobSet, one pod for each host.
#
#   launchers/xpk.sh --cluster CLUSTER --docker-image IMAGE --tpu-type v5litepod-64 --spot \
#       -- --dataset_path gs://your-bucket/streams/stream_000.jsonl --upload_to_gcs --gcs_bucket your-bucket
#
# What stands before -- goes to `xpk workload create`, what stands behind it to extract_activations.py.
set -euo pipefail

xpk_flags=()
while (($#)) && [[ $1 != -- ]]; do
    xpk_flags+=("$1")
    shift
done
(($# > 1)) || {
    echo "error: the flags of extract_activations.py are missing behind --" >&2
    exit 2
}
shift

# GKE tells the hosts of a slice from each other, and JAX asks it; WORKER_ID tells slices from each other.
printf -v command '%q ' python extract_activations.py --multihost --worker_id "${WORKER_ID:-0}" "$@"
# xpk starts a slice again after exit codes from 127 on; 1 is a crash as well, and only 2, wrong flags, is final.
exec xpk workload create --workload "activations-${WORKER_ID:-0}" --num-slices 1 --max-restarts 100 \
    --restart-on-exit-codes 1 "${xpk_flags[@]}" --command "$command"
