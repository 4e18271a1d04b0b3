#!/bin/sh
# Runs the parity tests of kernels on checked builds of the emulator: check-kernels.sh KIND[="TEST .."]...
#   asan   AddressSanitizer: a store or load outside of the operands, globally or in shared memory
#   race   accesses that no barrier or wait orders, within a block and between blocks
#   plain  without
# All tests run, or those named: check-kernels.sh asan race="attention lookups". Each case runs about once; HYDRA_KERNEL_TESTS=full runs all in
# all orders, which takes hours. The test program is built by cargo; kernels by build.sh.
set -eu
cd "$(dirname "$0")/.."
target=$(realpath "${CARGO_TARGET_DIR:-target}")
test=$(cargo test --locked --features cuda,emulator --test kernels --no-run --message-format=json 2>/dev/null |
    sed -n 's/.*"executable":"\([^"]*kernels-[^"]*\)".*/\1/p' | tail -n 1)
[ -n "$test" ] || { echo "the test program does not build: cargo test --features cuda,emulator --test kernels" >&2; exit 1; }
asan=$(${CXX:-c++} -print-file-name=libasan.so)
# Not those that compare bits: they have nothing to say of accesses.
all=$("$test" --list 2>/dev/null | sed -n '/^bits::/d; s/: test$//p')
export target test asan HYDRA_KERNEL_TESTS="${HYDRA_KERNEL_TESTS:-brief}" HYDRA_EMULATOR_THREADS=1 ASAN_OPTIONS=detect_leaks=0
for asked in "$@"; do
    sh kernels/emulator/build.sh "$target/kernels-${asked%%=*}" "${asked%%=*}"
    rm -f "$target/kernels-${asked%%=*}"/*.log
done
# Each test of each kind is a process of one thread, since what the checkers keep of memory is the process's own; those that take longest come first.
for asked in "$@"; do
    case $asked in *=*) tests=${asked#*=} ;; *) tests=$all ;; esac
    for one in $tests; do
        case $one in images | attention) order=1 ;; linear | norms) order=2 ;; *) order=3 ;; esac
        echo "$order ${asked%%=*} $one"
    done
done | sort -n | xargs -P "$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)" -L 1 sh -c '
    kind=$2 name=$3 log=$target/kernels-$2/$3.log
    [ "$kind" = asan ] && export LD_PRELOAD=$asan
    if HYDRA_KERNELS=$target/kernels-$kind "$test" -q --test-threads 1 "$name" > "$log" 2>&1; then
        echo "parity of kernels, $kind, $name:$(sed -n "s/^test result: ok\.\( [1-9][0-9]* passed\).*; finished/\1/p" "$log")"
    else
        echo "parity of kernels, $kind, $name: failed" >&2
        cat "$log" >&2
        exit 1
    fi' -
