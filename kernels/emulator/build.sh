#!/bin/sh
# Compiles kernels/*.cu and the emulator for the CPU, into one shared object: build.sh OUT_DIR [plain|asan|race]
#   plain  as fast as the emulator goes
#   asan   AddressSanitizer watches global and shared memory, and vectors have to lie where their size wants, as on a GPU; run with
#          LD_PRELOAD=$(gcc -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0
#   race   every access to memory is checked against what barriers and waits order
# Only what changed is compiled again. SOURCES names other kernels than kernels/*.cu, for an op of one's own. CXX names the compiler
# (default c++). build.rs calls this for the feature "emulator".
set -eu
out=$1 kind=${2:-plain}
kernels=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$out"
# No contraction: a multiply-add is fused where the source says so, as in the kernels.
common="-std=c++20 -fPIC -ffp-contract=off -march=x86-64-v3 -Wall -Wno-unknown-pragmas -Wno-psabi -I$kernels"
case $kind in
    plain) kernel_flags="-O2" runtime_flags="-O2" link_flags="" ;;
    asan) kernel_flags="-O1 -g1 -fsanitize=address,alignment -fno-sanitize-recover=alignment" runtime_flags="-O2 -g1 -fsanitize=address" link_flags="-fsanitize=address,alignment" ;;
    race) kernel_flags="-O1 -g1 -fsanitize=thread -Wno-maybe-uninitialized" runtime_flags="-O2 -g1" link_flags="" ;;
    *) echo "build.sh: $kind is none of plain, asan, race" >&2; exit 2 ;;
esac
export CXX="${CXX:-c++}" common kernel_flags runtime_flags out kernels

compile() {
    source=$1
    object=$out/$(basename "$source").o
    # A header that is newer than the object, or the source itself, compiles it again.
    if [ -f "$object" ] && [ -z "$(find "$source" "$kernels" -newer "$object" \( -path "$source" -o -name '*.cuh' -o -name '*.h' -o -name build.sh \) | head -n 1)" ]; then
        return 0
    fi
    # nvcc makes a program of each file; here all are linked into one, where functions of equal names would silently become one function. So each
    # .cu, with what it includes beside gpu.cuh, stands in a namespace of its own; only kernels' own names, which are C's, have to differ.
    case $source in
        *.cu)
            stem=$(basename "$source" .cu | tr -c '[:alnum:]\n' _)
            printf '#include "gpu.cuh"\nnamespace file_%s {\n#include "%s"\n}\n' "$stem" "$source" |
                $CXX $common $kernel_flags -x c++ -c - -o "$object.new"
            ;;
        *) $CXX $common $runtime_flags -x c++ -c "$source" -o "$object.new" ;;
    esac && mv "$object.new" "$object"
}
if [ "${3:-}" = compile ]; then
    compile "$4"
    exit
fi

sources="${SOURCES:-$(echo "$kernels"/*.cu)} $(echo "$kernels"/emulator/*.cpp)"
cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
# shellcheck disable=SC2086
printf '%s\n' $sources | xargs -P "$cores" -I{} sh "$0" "$out" "$kind" compile {}
objects=""
for source in $sources; do objects="$objects $out/$(basename "$source").o"; done
# shellcheck disable=SC2086
$CXX -shared $link_flags $objects -o "$out/kernels.so.new"
mv "$out/kernels.so.new" "$out/kernels.so"
