#!/usr/bin/env bash
# Makes the Python environment of a TPU VM from the checkout that contains this script. If everything is installed
# already, it does nothing.
#
#   setup_tpu_vm.sh [--dir DIR] [--extra tpu]
#
# DIR (default ~/activations) gets venv/, the environment, and work/, where the extraction runs.
set -euo pipefail
code=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dir=$HOME/activations
extra=tpu

die() {
    echo "error: $2" >&2
    exit "$1"
}

while (($#)); do
    case $1 in
    --dir) dir=${2:?--dir needs a folder} && shift 2 ;;
    --extra) extra=${2:?--extra needs tpu or cuda} && shift 2 ;;
    *) die 2 "$1: setup_tpu_vm.sh takes --dir and --extra" ;;
    esac
done
[[ $extra =~ ^(tpu|cuda)$ ]] || die 2 "--extra $extra: tpu or cuda"

# TPU VMs run Ubuntu 22.04, which has Python 3.10, and only a release candidate of 3.11.
usable_python() {
    "$1" -c 'import ensurepip, sys, venv
sys.exit(not ((3, 11) <= sys.version_info < (3, 13) and sys.version_info.releaselevel == "final"))' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in python3.12 python3.11 python3; do
        if usable_python "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    echo "no released Python 3.11 or 3.12 here: installing one with uv" >&2
    python3 -m pip install --quiet --user uv >&2
    python3 -m uv python install --quiet 3.12 >&2
    python3 -m uv python find 3.12
}

# What is installed depends only on these two files and the path of the code.
fingerprint() {
    { cat "$code/setup.cfg" "$code/constraints.txt" && echo "$code $extra"; } | sha256sum | cut -d' ' -f1
}

install() {
    local python
    # An environment whose creation was interrupted has no pip.
    if ! "$dir/venv/bin/python" -m pip --version >/dev/null 2>&1; then
        python=$(find_python)
        "$python" -m venv --clear "$dir/venv"
    fi
    "$dir/venv/bin/python" -m pip install --quiet --disable-pip-version-check --retries 10 \
        --constraint "$code/constraints.txt" --editable "${code}[$extra]"
}

mkdir -p "$dir/work" "$dir/logs"
exec 9>"$dir/.setup.lock"
flock 9
stamp=$dir/venv/.installed
wanted=$(fingerprint)
if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    echo "$dir/venv is up to date"
    exit 0
fi
rm -f "$stamp"
install
echo "$wanted" >"$stamp"
echo "$dir/venv is ready"
