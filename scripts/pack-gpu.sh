#!/bin/sh
# Builds program, tests and benches for the cuda device and puts them into one folder that runs on a machine with an NVIDIA driver and no Rust.
#   scripts/pack-gpu.sh [DIR]        default target/gpu-pack
#   PEERS=path/to/peers.py           a script that measures PyTorch on the same shapes, carried along and run last
#   FEATURES=emulator                 features beside: with this one run.sh can be tried where there is no GPU (DEVICE=emulated)
#   HYDRA_CUDA_ARCHS="80 90a"        the chips it is for. The default is A100, RTX 30 and 40, L40S; H100, H200. Blackwell is "100" and "120"
# Then copy DIR there, or DIR.tar.gz, which is the same compressed, and run `sh DIR/run.sh`; docs/gpu.md says what comes back. Needs nvcc here (see
# docs/gpu.md), no GPU.
set -eu
# Before minutes of building; and it is named from where this was called.
if [ -n "${PEERS:-}" ]; then
    [ -f "$PEERS" ] || { echo "pack-gpu.sh: PEERS is $PEERS, and there is no such file" >&2; exit 2; }
    PEERS=$(realpath "$PEERS")
fi
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
out=${1:-target/gpu-pack}
log=target/gpu-pack.log
mkdir -p target
export HYDRA_CUDA_ARCHS="${HYDRA_CUDA_ARCHS:-80 90a}"

# One set of features for everything, so that the engine is compiled once. cuBLAS beside ours is wanted, and done without where it does not build.
features=peers${FEATURES:+,$FEATURES}
if ! cargo build --release --features "$features" --message-format=json >"$log" 2>"$log.err"; then
    echo "pack-gpu.sh: the feature \"peers\" does not build, so cuBLAS will not be beside ours:" >&2
    tail -n 5 "$log.err" >&2
    features=cuda${FEATURES:+,$FEATURES}
fi
executable_of() {
    # Of the target that the last argument names; tests and benches come with the program that they may run.
    for target; do :; done
    [ "$target" != --lib ] || target=hydra
    cargo "$@" --features "$features" --message-format=json >"$log" 2>"$log.err" || { cat "$log.err" >&2; return 1; }
    sed -n "/\"name\":\"$target\"/s/.*\"executable\":\"\([^\"]*\)\".*/\1/p" "$log" | tail -n 1
}

rm -rf "$out"
mkdir -p "$out/bin" "$out/fixtures" "$out/kernels/gpu"
take() {
    # take NAME cargo arguments: builds one executable and copies it under a plain name, stripped.
    name=$1
    shift
    executable=$(executable_of "$@")
    cp "$executable" "$out/bin/$name"
    strip -s "$out/bin/$name"
}
take hydra build --release --bin hydra
take test-kernels test --release --no-run --test kernels
take test-library test --release --no-run --lib
take test-reference test --release --no-run --test reference
take bench-kernels bench --no-run --bench kernels

for fixture in gpt2 llama mistral qwen2 qwen3 yarn low-rank bert vit resnet resnet-basic; do cp -R "tests/fixtures/$fixture" "$out/fixtures/"; done
cp -R tests/packed/. "$out/"
cp kernels/*.cu kernels/*.cuh "$out/kernels/"
cp kernels/gpu/*.cuh "$out/kernels/gpu/"
cp docs/gpu.md "$out/README.md"
if [ -n "${PEERS:-}" ]; then cp "$PEERS" "$out/peers.py"; fi
{
    echo "commit $(git rev-parse HEAD 2>/dev/null || echo unknown)$(git diff --quiet 2>/dev/null || echo ', with changes')"
    echo "features $features, for sm_$(echo "$HYDRA_CUDA_ARCHS" | sed 's/[ ,]/, sm_/g')"
    rustc --version
    "${NVCC:-nvcc}" --version 2>/dev/null | tail -n 2 || true
} >"$out/built-from.txt"
chmod +x "$out"/*.sh
bytes=$(du -sk "$out" | cut -f 1)
tar -czf "$out.tar.gz" -C "$(dirname "$out")" "$(basename "$out")"
echo "packed $out: $bytes KiB, features $features; $out.tar.gz: $(du -k "$out.tar.gz" | cut -f 1) KiB"
du -k "$out"/bin/* | sort -n
