#!/bin/sh
# Runs the parity tests of kernels on checked builds of the emulator: check-kernels.sh KIND[="TEST .."]...
#   asan   AddressSanitizer: a store or load outside of the operands, globally or in shared memory
#   race   accesses that no barrier or wait orders, within a block and between blocks
#   plain  without
# All tests run, or those named: check-kernels.sh asan race="attention lookups". Each case runs about once; HYDRA_KERNEL_TESTS=full runs all in
# all orders, which takes hours. The test program is built by cargo; kernels by build.sh.
set -eu
cd "$(dirname "$0")/.."
target=${CARGO_TARGET_DIR:-target}
test=$(cargo test --locked --features cuda,emulator --test kernels --no-run --message-format=json 2>/dev/null |
    sed -n 's/.*"executable":"\([^"]*kernels-[^"]*\)".*/\1/p' | tail -n 1)
[ -n "$test" ] || { echo "the test program does not build: cargo test --features cuda,emulator --test kernels" >&2; exit 1; }
# The kinds run side by side, each on one core: what the checkers keep of memory is the process's own.
running=""
for asked in "$@"; do
    kind=${asked%%=*} tests=""
    case "$asked" in *=*) tests=${asked#*=} ;; esac
    sh kernels/emulator/build.sh "$target/kernels-$kind" "$kind"
    preload=""
    [ "$kind" = asan ] && preload=$(${CXX:-c++} -print-file-name=libasan.so)
    HYDRA_KERNEL_TESTS="${HYDRA_KERNEL_TESTS:-brief}" HYDRA_KERNELS="$target/kernels-$kind" LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0 \
        HYDRA_EMULATOR_THREADS=1 "$test" -q --test-threads 1 $tests > "$target/kernels-$kind.log" 2>&1 &
    running="$running $kind:$!"
done
failed=0
for one in $running; do
    kind=${one%%:*}
    if wait "${one#*:}"; then
        echo "parity of kernels, $kind: $(grep 'test result' "$target/kernels-$kind.log")"
    else
        echo "parity of kernels, $kind: failed" >&2
        cat "$target/kernels-$kind.log" >&2
        failed=1
    fi
done
exit "$failed"
