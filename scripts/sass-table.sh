#!/bin/sh
# The table of kernels, registers, spills and tensor instructions, from the fatbins that `cargo build --features cuda` left.
#   scripts/sass-table.sh                 prints it
#   scripts/sass-table.sh --write         puts it into docs/kernels.md
#   scripts/sass-table.sh DIR [ARCH ..]   of the fatbins in DIR, for these architectures (default sm_90a and sm_80)
# Needs cuobjdump (CUOBJDUMP, or beside NVCC, or on PATH) with nvdisasm beside it, and python3.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
write=""
if [ "${1:-}" = --write ]; then
    write="--write $root/docs/kernels.md"
    shift
fi
cuobjdump=${CUOBJDUMP:-}
if [ -z "$cuobjdump" ] && [ -n "${NVCC:-}" ] && [ -x "$(dirname "$NVCC")/cuobjdump" ]; then
    cuobjdump=$(dirname "$NVCC")/cuobjdump
fi
[ -n "$cuobjdump" ] || cuobjdump=$(command -v cuobjdump) || {
    echo "sass-table.sh: no cuobjdump: name it in CUOBJDUMP, or pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm" >&2
    exit 2
}
if [ $# -gt 0 ]; then
    dir=$1
    shift
else
    # The newest of all builds.
    list=$(ls -t "$root"/target/*/build/hydra-spill-*/out/fatbins/list.rs 2>/dev/null | head -n 1)
    [ -n "$list" ] || { echo "sass-table.sh: no fatbins; run cargo build --features cuda" >&2; exit 2; }
    dir=$(dirname "$list")
fi
PATH="$(dirname "$cuobjdump"):$PATH"
# shellcheck disable=SC2086
exec python3 "$root/scripts/sass_table.py" "$cuobjdump" "$dir" $write "$@"
