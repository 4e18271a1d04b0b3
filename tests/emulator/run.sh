#!/bin/sh
# Tests the emulator: compiles the kernels here in three ways, and runs all cases on each: run.sh [OUT_DIR]
# Needs a C++ compiler. With NVCC set, nvcc compiles the kernels too, for every target or those of HYDRA_CUDA_ARCHS, without a warning
# and without products that are made to wait for each other; of the kernels in planted it has to say that they are. No compiler may take those in refused.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
kernels=$(cd "$here/../../kernels" && pwd)
out=${1:-$(mktemp -d)}
[ $# -gt 0 ] || trap 'rm -rf "$out"' EXIT
mkdir -p "$out"
CXX=${CXX:-c++}

compile_check() {
    for source in "$here"/*.cpp; do
        $CXX -std=c++20 -O1 -Wall -Wextra -I"$kernels/emulator" -c "$source" -o "$out/$(basename "$source").o"
    done
    $CXX "$out"/*.cpp.o -o "$out/check" -ldl -lpthread
}
compile_check &
check=$!
for kind in plain asan race; do
    SOURCES="$(echo "$here"/kernels/*.cu)" sh "$kernels/emulator/build.sh" "$out/$kind" $kind
done
wait $check

failed=0
"$out/check" plain "$out/plain/kernels.so" || failed=1
"$out/check" race "$out/race/kernels.so" || failed=1
# Kernels' stacks are fibers', which the search for leaks does not know.
LD_PRELOAD=$($CXX -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 "$out/check" asan "$out/asan/kernels.so" || failed=1

# What a compiler has to refuse.
for source in "$here"/refused/*.cu; do
    if $CXX -std=c++20 -fsyntax-only -Wno-unknown-pragmas -I"$kernels" -x c++ "$source" 2>"$out/refused.log"; then
        echo "FAIL $(basename "$source") compiles"
        failed=1
    elif grep -q "$(sed -n 's|^// The compiler has to say: ||p' "$source")" "$out/refused.log"; then
        echo "ok   refused $(basename "$source")"
    else
        echo "FAIL $(basename "$source") is refused for something else"
        cat "$out/refused.log"
        failed=1
    fi
done

if [ -n "${NVCC:-}" ]; then
    targets=""
    for arch in ${HYDRA_CUDA_ARCHS:-80 86 89 90a 100 120}; do targets="$targets -gencode=arch=compute_$arch,code=sm_$arch"; done
    for source in "$here"/kernels/*.cu; do
        # shellcheck disable=SC2086
        if "$NVCC" -std=c++17 -fatbin $targets -Werror all-warnings -I"$kernels" -o "$out/nvcc.fatbin" "$source" >"$out/nvcc.log" 2>&1 &&
            ! grep -q "Performance Loss" "$out/nvcc.log"; then
            echo "ok   nvcc  $(basename "$source")"
        else
            echo "FAIL nvcc  $(basename "$source")"
            cat "$out/nvcc.log"
            failed=1
        fi
    done
    for source in "$here"/planted/*.cu; do
        if "$NVCC" -std=c++17 -cubin -arch=sm_90a -I"$kernels" -o "$out/nvcc.cubin" "$source" >"$out/nvcc.log" 2>&1 &&
            grep -q "Performance Loss" "$out/nvcc.log"; then
            echo "ok   nvcc  planted $(basename "$source")"
        else
            echo "FAIL nvcc  planted $(basename "$source") is not found"
            cat "$out/nvcc.log"
            failed=1
        fi
    done
fi
exit $failed
