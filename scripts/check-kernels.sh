#!/bin/sh
# Runs the parity tests of all kernels on checked builds of the emulator: check-kernels.sh [asan|race|plain]...
#   asan   AddressSanitizer: a store or load outside of the operands, globally or in shared memory
#   race   accesses that no barrier or wait orders, within a block and between blocks
# HYDRA_KERNEL_TESTS=full runs all cases in all orders; the ordinary run fewer. The test program is built by cargo; kernels by build.sh.
set -eu
cd "$(dirname "$0")/.."
target=${CARGO_TARGET_DIR:-target}
test=$(cargo test --locked --features cuda,emulator --test kernels --no-run --message-format=json 2>/dev/null |
    sed -n 's/.*"executable":"\([^"]*kernels-[^"]*\)".*/\1/p' | tail -n 1)
[ -n "$test" ] || { echo "the test program does not build: cargo test --features cuda,emulator --test kernels" >&2; exit 1; }
for kind in "$@"; do
    sh kernels/emulator/build.sh "$target/kernels-$kind" "$kind"
    preload=""
    [ "$kind" = asan ] && preload=$(${CXX:-c++} -print-file-name=libasan.so)
    echo "parity of kernels, $kind"
    HYDRA_KERNELS="$target/kernels-$kind" LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0 "$test" -q
done
