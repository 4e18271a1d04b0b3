#!/bin/sh
# Builds program, tests and benches for the cuda device and puts them into one folder that runs on a machine with an NVIDIA driver and no Rust.
#   scripts/pack-gpu.sh [DIR]        default target/gpu-pack
#   PEERS=path/to/peers.py           a script that measures PyTorch on the same shapes, carried along and run last
#   CARGO_BUILD_JOBS=N               as always
# Then copy DIR there and run `sh DIR/run.sh`; docs/gpu.md says what comes back. Needs nvcc here (see docs/gpu.md), no GPU.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
out=${1:-target/gpu-pack}
log=target/gpu-pack.log
mkdir -p target

# One set of features for everything, so that the engine is compiled once. cuBLAS beside ours is wanted, and done without where it does not build.
features=peers
if ! cargo build --release --features peers --message-format=json >"$log" 2>"$log.err"; then
    echo "pack-gpu.sh: the feature \"peers\" does not build, so cuBLAS will not be beside ours:" >&2
    tail -n 5 "$log.err" >&2
    features=cuda
fi
messages() {
    # The executables of one cargo call, one a line.
    cargo "$@" --features "$features" --message-format=json 2>"$log.err" >"$log" || { cat "$log.err" >&2; exit 1; }
    sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' "$log"
}

rm -rf "$out"
mkdir -p "$out/bin" "$out/fixtures" "$out/kernels/gpu"
take() {
    # Copies one executable under a plain name, stripped.
    cp "$2" "$out/bin/$1"
    strip -s "$out/bin/$1"
}
take hydra "$(messages build --release --bin hydra | tail -n 1)"
for test in kernels reference; do
    take "test-$test" "$(messages test --release --no-run --test "$test" | tail -n 1)"
done
take bench-kernels "$(messages bench --no-run --bench kernels | tail -n 1)"

cp -R tests/fixtures/gpt2 tests/fixtures/resnet tests/fixtures/resnet-basic "$out/fixtures/"
cp -R tests/packed/. "$out/"
cp kernels/*.cu kernels/*.cuh "$out/kernels/"
cp kernels/gpu/*.cuh "$out/kernels/gpu/"
cp docs/gpu.md "$out/README.md"
if [ -n "${PEERS:-}" ]; then cp "$PEERS" "$out/peers.py"; fi
{
    echo "commit $(git rev-parse HEAD 2>/dev/null || echo unknown)$(git diff --quiet 2>/dev/null || echo ', with changes')"
    echo "features $features"
    rustc --version
    "${NVCC:-nvcc}" --version 2>/dev/null | tail -n 2 || true
} >"$out/built-from.txt"
chmod +x "$out"/*.sh
bytes=$(du -sk "$out" | cut -f 1)
echo "packed $out: $bytes KiB, features $features"
du -k "$out"/bin/* | sort -n
