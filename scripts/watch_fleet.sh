#!/usr/bin/env bash
# Keeps a fleet running until the dataset is finished: manage_tpus.sh launch --watch, with the same flags.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/manage_tpus.sh" launch --watch "$@"
