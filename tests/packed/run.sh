#!/bin/sh
# Runs what scripts/pack-gpu.sh packed, on a machine with an NVIDIA driver: parity, training, benches, peers. Writes results/RESULTS.md and the
# JSON beside it; copy that folder back.
#   sh run.sh [parity] [training] [large] [bench] [peers]     no part named = all
#   QUICK=1            few samples and short jobs, to see that it runs
#   HYDRA_REQUIRE_GPU  default 1: no GPU is a failure; 0: it is said, and the rest goes on
#   DEVICE=host        tries this script itself where there is no GPU: jobs on the CPU
#   HYDRA_KERNELS=DIR  kernels to load instead of those built in (see build-kernels.sh)
#   PYTHON=...         the Python that has torch, for peers.py
set -u
here=$(cd "$(dirname "$0")" && pwd)
results=${RESULTS:-$here/results}
device=${DEVICE:-cuda}
export HYDRA_REQUIRE_GPU="${HYDRA_REQUIRE_GPU:-1}" HYDRA_FIXTURES="$here/fixtures"
[ "$device" = cuda ] || HYDRA_REQUIRE_GPU=0
[ "$HYDRA_REQUIRE_GPU" = 0 ] && unset HYDRA_REQUIRE_GPU
[ "${QUICK:-0}" = 0 ] || export HYDRA_BENCH_QUICK=1
parts=${*:-parity training large bench peers}
mkdir -p "$results"
report=$results/RESULTS.md
failures=0

# Lines for the report, one an argument.
say() { printf '%s\n' "$@" | tee -a "$report"; }
# Runs a command, keeps all that it prints in LOG, puts the command and the last lines into the report.
#   step LOG LINES command ...
step() {
    log=$results/$1 lines=$2
    shift 2
    say "" "    \$ $(printf '%s ' "$@" | sed "s|$here/||g")"
    begin=$(date +%s)
    "$@" >"$log" 2>&1
    code=$?
    say "" '```'
    tail -n "$lines" "$log" | tee -a "$report"
    say '```' "" "exit $code after $(($(date +%s) - begin)) s; all of it in $(basename "$log")"
    [ "$code" = 0 ] || failures=$((failures + 1))
    return "$code"
}
wanted() { case " $parts " in *" $1 "*) return 0 ;; *) return 1 ;; esac; }
# A number from a JSON file: field FILE NAME
field() { sed -n "s/.*\"$2\": *\([0-9.e+-]*\).*/\1/p" "$1" | head -n 1; }

: >"$report"
say "# Results of a GPU machine" ""
say "$(date -u '+%Y-%m-%d %H:%M UTC'); command: \`sh run.sh $parts\`, device $device${HYDRA_KERNELS:+, kernels from $HYDRA_KERNELS}" ""
say '```' "$(cat "$here/built-from.txt")" "$(uname -srm), $(getconf _NPROCESSORS_ONLN) cores, $(sed -n 's/MemTotal: *//p' /proc/meminfo)"
if command -v nvidia-smi >/dev/null; then
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit,pcie.link.gen.max,pcie.link.width.max,persistence_mode,compute_mode \
        --format=csv 2>&1 | tee -a "$report"
    nvidia-smi >"$results/nvidia-smi.txt" 2>&1
else
    say "no nvidia-smi here"
fi
say '```'

if wanted parity; then
    say "" "## Parity" "" "Every op on the device against the host's f64, and training against PyTorch's weights, resident and under three budgets with the same bits."
    if [ "$device" = cuda ]; then
        step parity.log 25 env HYDRA_KERNEL_TESTS_DEVICE=cuda "$here/bin/test-kernels" --test-threads 4
        step reference.log 15 env HYDRA_KERNEL_TESTS_DEVICE=cuda "$here/bin/test-reference" --test-threads 1
    else
        step reference.log 15 "$here/bin/test-reference" --test-threads 1
    fi
fi

# Trains a job twice, resident and with a share of that run's memory, and compares the trained models byte for byte.
#   pair NAME PERCENT [--set ...]
pair() {
    name=$1 percent=$2
    shift 2
    rm -rf "$results/runs/$name" "$results/runs/$name-spilled"
    set_steps=""
    [ "${QUICK:-0}" = 0 ] || set_steps="--set model.0.steps=3"
    # shellcheck disable=SC2086
    step "$name.log" 12 "$here/bin/hydra" train "$here/jobs/$name.toml" --set "run.out=$results/runs/$name" --set "device.0.kind=$device" $set_steps "$@" || return
    peak=$(field "$results/runs/$name/plan.json" device_peak_bytes)
    smallest=$(field "$results/runs/$name/plan.json" smallest_device_bytes)
    budget=$((peak * percent / 100))
    [ "$budget" -ge "$smallest" ] || budget=$smallest
    # shellcheck disable=SC2086
    step "$name-spilled.log" 12 "$here/bin/hydra" train "$here/jobs/$name.toml" --set "run.out=$results/runs/$name-spilled" --set "device.0.kind=$device" \
        --set "device.0.memory=$budget" $set_steps "$@" || return
    if cmp -s "$results/runs/$name/$name/model/model.safetensors" "$results/runs/$name-spilled/$name/model/model.safetensors"; then
        say "" "$name: resident peak $peak bytes, spilled under $budget: the same bits."
    else
        say "" "$name: resident peak $peak bytes, spilled under $budget: OTHER BITS."
        failures=$((failures + 1))
    fi
    keep "$name" "$name"
    keep "$name" "$name-spilled"
}
# What travels back of a run: not its weights, which can take gigabytes.
#   keep NAME RUN
keep() {
    for file in plan.json trace.json; do cp "$results/runs/$2/$file" "$results/$2.$file"; done
    cp "$results/runs/$2/$1/metrics.jsonl" "$results/$2.metrics.jsonl"
    say "" "Last steps of $2:" '```' "$(tail -n 3 "$results/$2.metrics.jsonl")" '```'
    rm -rf "$results/runs/$2"
}
# The first steps of a job whose checkpoint is not wanted: it is stopped once its metrics have so many lines.
#   first_steps STEPS NAME RUN [--set ...]
first_steps() {
    steps=$1 name=$2 run=$3
    shift 3
    say "" "    \$ bin/hydra train jobs/$name.toml $* # as $run, stopped after $steps steps"
    "$here/bin/hydra" train "$here/jobs/$name.toml" --set "run.out=$results/runs/$run" --set "device.0.kind=$device" "$@" >"$results/$run.log" 2>&1 &
    program=$!
    lines=0
    while [ "$lines" -lt "$steps" ] && kill -0 "$program" 2>/dev/null; do
        sleep 1
        lines=$(wc -l <"$results/runs/$run/$name/metrics.jsonl" 2>/dev/null || echo 0)
    done
    kill -KILL "$program" 2>/dev/null
    wait "$program" 2>/dev/null
    if [ "$lines" -lt "$steps" ]; then
        say "" "$run ended by itself:" '```' "$(tail -n 5 "$results/$run.log")" '```'
        failures=$((failures + 1))
        return 1
    fi
    peak=$(field "$results/runs/$run/plan.json" device_peak_bytes)
    keep "$name" "$run"
}
if wanted training; then
    say "" "## Training" "" "Random data; resident, then with a part of the memory."
    step devices.log 30 "$here/bin/hydra" devices
    pair small 40
    if [ "$device" != host ]; then
        pair gpt2-124m 25 --set model.0.microbatch=8
        first_steps 6 gpt2-124m gpt2-124m-whole
    fi
fi
if wanted large && [ "$device" != host ]; then
    say "" "## Training a model of 1.6 billion parameters" "" "As in peers.py: 8 x 1024 tokens a step, without clipping; resident, then with a quarter of that memory."
    first_steps 6 gpt2-1558m gpt2-1558m && first_steps 6 gpt2-1558m gpt2-1558m-spilled --set "device.0.memory=$((peak / 4))"
fi

rmdir "$results/runs" 2>/dev/null

if wanted bench; then
    say "" "## Kernels" "" "Medians and spread; the share is of the roofline measured in the same run; cuBLAS runs in turn with ours."
    # cuBLAS may be PyTorch's own copy.
    torch_libs=$("${PYTHON:-python3}" -c 'import glob, site; print(":".join(d for s in site.getsitepackages() + [site.getusersitepackages()] for d in glob.glob(s + "/nvidia/*/lib")))' 2>/dev/null)
    LD_LIBRARY_PATH=${LD_LIBRARY_PATH:-}${torch_libs:+:$torch_libs}
    export LD_LIBRARY_PATH HYDRA_BENCH_JSON="$results/kernels.json"
    step kernels.log 700 "$here/bin/bench-kernels"
    # Twice: a difference between the two runs is what noise looks like.
    HYDRA_BENCH_JSON=$results/kernels-again.json
    step kernels-again.log 2 "$here/bin/bench-kernels"
fi

if wanted peers && [ -f "$here/peers.py" ]; then
    say "" "## PyTorch on the same shapes"
    if [ "$device" = cuda ] && "${PYTHON:-python3}" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
        rm -f "$results/peers.jsonl"
        step peers.log 400 "${PYTHON:-python3}" "$here/peers.py" "$results/peers.jsonl" ceilings kernels training offload
    else
        say "" "No PyTorch that sees a GPU in ${PYTHON:-python3}: not measured."
    fi
fi

say "" "$failures steps failed."
[ "$failures" = 0 ]
