#!/bin/sh
# Runs what scripts/pack-gpu.sh packed, on a machine with an NVIDIA driver: parity, training, benches, peers. Adds to results/RESULTS.md and
# writes JSON beside it; copy that folder back, or results.tar.gz, which is all of it.
#   sh run.sh [PART ..]      no part named = all, in this order; each may be run by itself, and what fails stops none of the others
#     parity                 each group of test-kernels a process, and test-library, with 4 multiprocessors and with all; test-reference
#     training               a small GPT; GPT-2 124M
#     large                  GPT-2 1558M: 45 GB of the GPU's memory, 30 GB of the host's
#     llama                  Llama 3.2's 1 billion, resident in 31 GB of the GPU's memory and with a quarter of that
#     bench, bench-again     kernels twice: a difference between the two runs is what noise looks like
#     peers                  peers.py, if it was packed; by its parts: peers-ceilings, peers-kernels, peers-training, peers-offload
#   QUICK=1            few samples and short jobs, no Llama, one run of the benches, of peers.py the ceilings: to see that it runs
#   LIMIT=540          seconds after which a step is stopped and the next begins; what a stopped step has printed is kept
#   GROUP_LIMIT=60     the same for a group of kernels on a GPU, which takes seconds unless a kernel hangs: that one it gives up after 20, and says so
#   HYDRA_REQUIRE_GPU  default 1: no GPU is a failure; 0: it is said, and the rest goes on
#   DEVICE=host        tries this script itself where there is no GPU: jobs on the CPU. DEVICE=emulated: parity and benches on the emulator, in a
#                      folder that was packed with FEATURES=emulator
#   HYDRA_KERNELS=DIR  kernels to load instead of those built in (see build-kernels.sh)
#   PYTHON=...         the Python that has torch, for peers.py
#   RESULTS=DIR        where results go; default: results beside this script
set -u
# A process that a fault ends leaves no file with all of its pinned memory.
ulimit -c 0
here=$(cd "$(dirname "$0")" && pwd)
results=${RESULTS:-$here/results}
device=${DEVICE:-cuda}
limit=${LIMIT:-540}
quick=${QUICK:-0}
python=${PYTHON:-python3}
export HYDRA_REQUIRE_GPU="${HYDRA_REQUIRE_GPU:-1}" HYDRA_FIXTURES="$here/fixtures"
[ "$device" = cuda ] || HYDRA_REQUIRE_GPU=0
[ "$HYDRA_REQUIRE_GPU" = 0 ] && unset HYDRA_REQUIRE_GPU
peers="peers-ceilings peers-kernels peers-training peers-offload"
all="parity training large llama bench bench-again peers"
if [ "$quick" != 0 ]; then
    export HYDRA_BENCH_QUICK=1
    all="parity training large bench peers"
    peers=peers-ceilings
fi
parts=${*:-$all}
for part in $parts; do
    case $part in
        parity | training | large | llama | bench | bench-again | peers | peers-ceilings | peers-kernels | peers-training | peers-offload) ;;
        *) echo "run.sh: there is no part $part; see the head of this script" >&2; exit 2 ;;
    esac
done
mkdir -p "$results"
report=$results/RESULTS.md
# Models in training lie here, not in the results: they can take gigabytes, and only what keep takes travels back.
runs=$here/running
failures=0
# Seconds that a step may take, where there is a program that stops it.
patience=$limit
timeout=$(command -v timeout) || timeout=""

# Lines for the report, one an argument.
say() { printf '%s\n' "$@" | tee -a "$report"; }
# Runs a command, keeps all that it prints in LOG, puts the command and the last lines into the report.
#   step LOG LINES command ...
step() {
    log=$results/$1 lines=$2
    shift 2
    say "" "    \$ $(printf '%s ' "$@" | sed "s|$here/||g")"
    begin=$(date +%s)
    ${timeout:+"$timeout" -k 10 "$patience"} "$@" >"$log" 2>&1
    code=$?
    say "" '```'
    # Of tests that fail the end says which; why stands where it happened.
    [ "$code" = 0 ] || grep -A 1 -m 3 'panicked at' "$log" | tee -a "$report"
    tail -n "$lines" "$log" | tee -a "$report"
    say '```' "" "exit $code after $(($(date +%s) - begin)) s; all of it in $(basename "$log")"
    case $code in 124 | 137) say "" "It hangs, or takes too long: it was stopped after $patience seconds." ;; esac
    [ "$code" = 0 ] || failures=$((failures + 1))
    return "$code"
}
# A number from a JSON file: field FILE NAME
field() { sed -n "s/.*\"$2\": *\([0-9.e+-]*\).*/\1/p" "$1" | head -n 1; }

head_of_report() {
    [ -s "$report" ] || say "# Results of a GPU machine"
    say "" "---" "" "$(date -u '+%Y-%m-%d %H:%M UTC'); command: \`sh run.sh $parts\`, device $device$([ "$quick" = 0 ] || echo ', quick')${HYDRA_KERNELS:+, kernels from $HYDRA_KERNELS}" ""
    say '```' "$(cat "$here/built-from.txt")" "$(uname -srm), $(getconf _NPROCESSORS_ONLN) cores, $(sed -n 's/MemTotal: *//p' /proc/meminfo)"
    if command -v nvidia-smi >/dev/null; then
        nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit,pcie.link.gen.max,pcie.link.width.max,persistence_mode,compute_mode \
            --format=csv 2>&1 | tee -a "$report"
        nvidia-smi >"$results/nvidia-smi.txt" 2>&1
    else
        say "no nvidia-smi here"
    fi
    say '```'
}

parity() {
    say "" "## Parity" "" "Every op on the device against the host's f64, and training against PyTorch's weights, resident and under three budgets with the same bits."
    [ -n "$timeout" ] || say "" "No timeout here: a step that hangs has to be stopped by hand."
    if [ "$device" != host ]; then
        export HYDRA_KERNEL_TESTS_DEVICE="$device"
        [ "$device" = cuda ] || export HYDRA_KERNEL_TESTS="${HYDRA_KERNEL_TESTS:-brief}"
        # With as few multiprocessors as the emulated GPU small shapes reach persistent loops, and kernels that else only large shapes are for.
        counts=all
        if [ "$device" = cuda ]; then
            counts="4 all"
            patience=${GROUP_LIMIT:-60}
        fi
        # What a test says comes at once: a process that is stopped, or ends by itself, takes with it what it kept back. The last line names the case.
        aloud="--nocapture --test-threads 1"
        # A group a process: an illegal access ends a process' context, and with it all that comes later in it.
        groups=$("$here/bin/test-kernels" --list | sed -n 's/: test$//p')
        [ -n "$groups" ] || { say "" "bin/test-kernels does not start here."; failures=$((failures + 1)); }
        for count in $counts; do
            few="" name=parity
            [ "$count" = all ] || few="env HYDRA_MULTIPROCESSORS=$count" name=parity-$count
            for group in $groups; do
                # shellcheck disable=SC2086
                step "$name-$(echo "$group" | sed 's/::/-/g').log" 6 $few "$here/bin/test-kernels" --exact "$group" $aloud
            done
            # shellcheck disable=SC2086
            step "$name-library.log" 6 $few "$here/bin/test-library" device::cuda $aloud
        done
        # All groups in one process, which fails where none of them launches a kernel.
        [ "$device" != cuda ] || step parity-covered.log 6 env HYDRA_MULTIPROCESSORS=4 "$here/bin/test-kernels" $aloud
        patience=$limit
    fi
    # The emulator's own test of training is in the source tree; here it would take long.
    [ "$device" = emulated ] || step reference.log 15 "$here/bin/test-reference" --nocapture --test-threads 1
}

# The program trains a job: train NAME RUN [--set ...]
train() {
    name=$1 run=$2
    shift 2
    # shellcheck disable=SC2086
    step "$run.log" 12 "$here/bin/hydra" train "$here/jobs/$name.toml" --set "run.out=$runs/$run" --set "device.0.kind=$device" $set_steps "$@"
}
# The same in the background until `$condition`, a command, holds, or LIMIT seconds are over; then it is stopped. To be used for a job whose last
# checkpoint, three times its weights in f32, would be written for nothing.
train_until() {
    condition=$1 name=$2 run=$3
    shift 3
    # shellcheck disable=SC2086
    say "" "    \$ bin/hydra train jobs/$name.toml $set_steps $* # as $run, until $condition"
    rm -rf "$runs"
    begin=$(date +%s)
    # shellcheck disable=SC2086
    "$here/bin/hydra" train "$here/jobs/$name.toml" --set "run.out=$runs/$run" --set "device.0.kind=$device" $set_steps "$@" >"$results/$run.log" 2>&1 &
    program=$!
    while ! $condition && kill -0 "$program" 2>/dev/null && [ $(($(date +%s) - begin)) -lt "$limit" ]; do sleep 1; done
    kill -KILL "$program" 2>/dev/null
    wait "$program" 2>/dev/null
    $condition && return
    say "" "$run ended after $(done_steps) steps and $(($(date +%s) - begin)) s, before $condition:" '```' "$(tail -n 5 "$results/$run.log")" '```'
    failures=$((failures + 1))
    return 1
}
# Conditions on the run under way.
done_steps() { if [ -f "$runs/$run/$name/metrics.jsonl" ]; then wc -l <"$runs/$run/$name/metrics.jsonl"; else echo 0; fi; }
steps_are_done() { [ "$(done_steps)" -ge "$steps" ]; }
# It gets its name when all of it is there.
model_is_saved() { [ -f "$runs/$run/$name/model/model.safetensors" ]; }

# Trains a job twice, resident and with a share of that run's memory, and compares the trained models by their hashes: one at a time is on the disk.
#   pair HOW NAME PERCENT [--set ...]       HOW: train, or "train_until model_is_saved"
pair() {
    how=$1 pair=$2 percent=$3
    shift 3
    set_steps=""
    [ "$quick" = 0 ] || set_steps="--set model.0.steps=3"
    rm -rf "$runs"
    $how "$pair" "$pair" "$@" || return
    resident=$(hash)
    peak=$(field "$runs/$run/plan.json" device_peak_bytes)
    smallest=$(field "$runs/$run/plan.json" smallest_device_bytes)
    keep
    budget=$((peak * percent / 100))
    [ "$budget" -ge "$smallest" ] || budget=$smallest
    $how "$pair" "$pair-spilled" --set "device.0.memory=$budget" "$@" || return
    spilled=$(hash)
    keep
    if [ -n "$resident" ] && [ "$resident" = "$spilled" ]; then
        say "" "$pair: resident peak $peak bytes, spilled under $budget: the same bits, $resident."
    else
        say "" "$pair: resident peak $peak bytes, spilled under $budget: OTHER BITS: $resident, $spilled."
        failures=$((failures + 1))
    fi
}
hash() { sha256sum "$runs/$run/$name/model/model.safetensors" | cut -c 1-64; }
# What travels back of the last run.
keep() {
    cp "$runs/$run/plan.json" "$results/$run.plan.json"
    cp "$runs/$run/$name/metrics.jsonl" "$results/$run.metrics.jsonl"
    # A run that was stopped has none.
    [ ! -f "$runs/$run/trace.json" ] || gzip -c "$runs/$run/trace.json" >"$results/$run.trace.json.gz"
    say "" "Last steps of $run:" '```' "$(tail -n 3 "$results/$run.metrics.jsonl")" '```'
    rm -rf "${runs:?}/$run"
}
# The first steps of a job: first_steps STEPS NAME RUN [--set ...]
first_steps() {
    steps=$1 set_steps=""
    shift
    train_until steps_are_done "$@" || return
    peak=$(field "$runs/$run/plan.json" device_peak_bytes)
    keep
}
training() {
    say "" "## Training" "" "Random data; resident, then with a part of the memory."
    step devices.log 30 "$here/bin/hydra" devices --profile "$results/profile.json"
    if [ "$device" = emulated ]; then
        say "" "Not on the emulator, where it would take hours."
        return
    fi
    pair train small 40
    if [ "$device" = cuda ]; then
        # The device makes updates of what visits: with clipping before the next forward, without after the backward.
        pair train gpt2-124m 25 --set model.0.microbatch=8 && first_steps 6 gpt2-124m gpt2-124m-unclipped --set model.0.microbatch=8 \
            --set "device.0.memory=$((budget * 3 / 2))" --set 'model.0.optimizer={ kind = "adamw", lr = 1e-4, weight_decay = 0.1 }'
        first_steps 6 gpt2-124m gpt2-124m-whole
    fi
}
large() {
    say "" "## Training a model of 1.6 billion parameters" "" "As in peers.py: 8 x 1024 tokens a step, without clipping; resident, then with a quarter of that memory."
    if [ "$device" != cuda ]; then
        say "" "On a GPU alone."
        return
    fi
    first_steps 6 gpt2-1558m gpt2-1558m && first_steps 6 gpt2-1558m gpt2-1558m-spilled --set "device.0.memory=$((peak / 4))"
}

llama() {
    say "" "## Training a Llama of 1.2 billion parameters" "" "16 x 2048 tokens a step in microbatches of 4, with clipping; resident, then with a quarter of that memory."
    if [ "$device" != cuda ]; then
        say "" "On a GPU alone."
        return
    fi
    pair "train_until model_is_saved" llama-1b 25
}

# The kernels' benches: bench NAME LINES
bench() {
    # cuBLAS may be PyTorch's own copy.
    torch_libs=$("$python" -c 'import glob, site; print(":".join(d for s in site.getsitepackages() + [site.getusersitepackages()] for d in glob.glob(s + "/nvidia/*/lib")))' 2>/dev/null)
    export HYDRA_BENCH_DEVICE="$device"
    step "$1.log" "$2" env LD_LIBRARY_PATH="${LD_LIBRARY_PATH:-}${torch_libs:+:$torch_libs}" HYDRA_BENCH_JSON="$results/$1.json" "$here/bin/bench-kernels"
}
# peers PART
peers() {
    if [ "$device" = cuda ] && "$python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
        step "peers-$1.log" 150 "$python" "$here/peers.py" "$results/peers.jsonl" "$1"
    else
        say "" "peers.py $1: no PyTorch that sees a GPU in $python: not measured."
    fi
}

head_of_report
for part in $parts; do
    case $part in
        bench)
            say "" "## Kernels" "" "Medians and spread; the share is of the roofline measured in the same run; cuBLAS runs in turn with ours."
            bench kernels 700
            ;;
        bench-again) bench kernels-again 2 ;;
        peers | peers-*)
            [ -f "$here/peers.py" ] || { say "" "No peers.py was packed."; continue; }
            say "" "## PyTorch on the same shapes"
            [ "$part" != peers ] || part=$peers
            for one in $part; do peers "${one#peers-}"; done
            ;;
        *) $part ;;
    esac
done
rm -rf "$runs"

say "" "$failures steps failed of \`run.sh $parts\`."
tar -czf "$results.tar.gz" -C "$(dirname "$results")" "$(basename "$results")"
[ "$failures" = 0 ]
