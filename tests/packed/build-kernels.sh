#!/bin/sh
# Compiles the packed kernels with this machine's nvcc (CUDA 13.0 or later; 12.8 where the driver is older than 580 is refused by the program).
#   sh build-kernels.sh [DIR] [ARCH ..]      default: DIR = built-kernels, ARCH = 90a; then HYDRA_KERNELS=DIR sh run.sh ...
# So that a .cu can be changed and measured where there is no Rust. As many files at once as there are cores. What ptxas says of registers and
# spills is in DIR/*.log.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
dir=${1:-$here/built-kernels}
[ $# -gt 0 ] && shift
nvcc=${NVCC:-${CUDA_HOME:-/usr/local/cuda}/bin/nvcc}
[ -x "$nvcc" ] || nvcc=$(command -v nvcc) || { echo "build-kernels.sh: no nvcc; name it in NVCC" >&2; exit 2; }
targets=""
for arch in "${@:-90a}"; do targets="$targets -gencode=arch=compute_$arch,code=sm_$arch"; done
mkdir -p "$dir"
export here dir nvcc targets
cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
# A file that does not compile ends it all, with what nvcc said. Its old fatbin goes, so that nobody measures that.
# shellcheck disable=SC2016
printf '%s\n' "$here"/kernels/*.cu | xargs -P "$cores" -I{} sh -c '
    stem=$(basename "$1" .cu)
    rm -f "$dir/$stem.fatbin"
    "$nvcc" -std=c++17 -O3 -lineinfo -fatbin -Xptxas -v -I "$here/kernels" $targets -o "$dir/$stem.fatbin" "$1" >"$dir/$stem.log" 2>&1 || {
        cat "$dir/$stem.log" >&2
        exit 255
    }
    echo "$stem"' sh {}
if grep -l "[1-9][0-9]* bytes spill" "$dir"/*.log; then echo "the kernels above spill registers" >&2; fi
echo "HYDRA_KERNELS=$dir"
