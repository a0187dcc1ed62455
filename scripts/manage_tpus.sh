#!/usr/bin/env bash
# Creates, recreates, watches and deletes the TPU VMs of a fleet: manage_tpus.sh --help, docs/tpu_fleets.md.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# The fleet code needs only Python: it also runs where the project is not installed, and -S makes it start faster.
for python in "${PYTHON:-}" "$root/.venv/bin/python" python3.12 python3.11 python3; do
    if [[ -n $python ]] && "$python" -S -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        # -P: modules in the current folder must not be taken for ours.
        exec "$python" -S -P -c 'import sys
sys.path.insert(0, sys.argv[1])
from fleet.command_line import main
sys.exit(main(sys.argv[2:]))' "$root" "$@"
    fi
done
echo "error: Python 3.11 or newer is needed: install it, or name it with PYTHON=/path/to/python" >&2
exit 1
