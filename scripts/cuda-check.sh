#!/usr/bin/env bash
# Everything there is to check on a machine with a GPU, in one call, without Rust and without a network.
#
#   scripts/cuda-check.sh pack [FILE]     # here: build tests and benchmarks, put them and this script into FILE
#                                         # (default target/cuda-check.tar.gz); with MEGACONTEXT_CUDA_FATBINS the
#                                         # machine with the GPU needs no NVRTC
#   tar xzf cuda-check.tar.gz && cuda-check/cuda-check.sh [FOLDER] [PART...]
#                                         # there: run them, logs into FOLDER (default cuda-check/out), one table at the end
#
# Parts, in their order; all of them unless some are named:
#
#   device     the launches against the processor's operations
#   decoder    the decoder's passes against the processor's
#   memcheck   compute-sanitizer over the launches; memcheck-decoder: over some of the decoder's tests
#   steps      mclora bench step, shapes of 1.1 and 7 billion parameters; gist: mclora bench gist
#   attention  the attention kernels, forward and backward
#   peer       the same work in PyTorch, where python3 has one that finds the GPU
#   racecheck, synccheck, initcheck: compute-sanitizer's other tools over the launches
#
# Each has a limit of its own, and all end within CUDA_CHECK_SECONDS (default 530): what was cut short, and what no time was left
# for, says so. What is not in the archive is left out with a line. Fails when a check fails; a measurement that fails is shown,
# and stops no other. Without a driver or a device it says so and runs nothing.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)

fail() {
    echo "cuda-check: $*" >&2
    exit 1
}

# built SOURCE COMMAND...: the program of that source, as the cargo command says in its JSON lines.
built() {
    local source=$1 program
    shift
    program=$("$@" --message-format=json-render-diagnostics) || fail "$* failed"
    program=$(sed -n "s#.*\"src_path\":\"[^\"]*/$source\".*\"executable\":\"\([^\"]*\)\".*#\1#p" <<<"$program")
    [ -x "$program" ] || fail "expected the program of $source from cargo, got: ${program:-nothing}"
    echo "$program"
}

pack() {
    local root file folder into name source tests=(cargo test --workspace --all-features --test cuda_device --test gpu --no-run)
    root=$(cd "$here/.." && pwd)
    file=$(realpath -m "${1:-$root/target/cuda-check.tar.gz}")
    folder=$(mktemp -d)
    into=$folder/cuda-check
    cd "$root"
    if [ -z "${MEGACONTEXT_CUDA_FATBINS:-}" ]; then
        echo "cuda-check: without MEGACONTEXT_CUDA_FATBINS the other machine needs NVRTC of CUDA 12 or 13" >&2
    fi
    mkdir -p "$into/peer" "$into/fixtures" "$(dirname "$file")"
    # What cargo has built it only names the second time.
    for name in cuda_device=kernels/tests/cuda_device.rs cuda_decoder=base/tests/gpu.rs; do
        source=$(built "${name#*=}" "${tests[@]}")
        strip -o "$into/${name%=*}" "$source"
    done
    source=$(built kernels/examples/cuda_bench.rs cargo build --workspace --all-features --example cuda_bench)
    strip -o "$into/cuda_bench" "$source"
    source=$(built src/bin/mclora/main.rs cargo build --release -p megacontext-lora --features cuda)
    strip -o "$into/mclora" "$source"
    # It is loaded by its dynamic symbols.
    strip --strip-unneeded -o "$into/libmegacontext_lora.so" "$(dirname "$source")/libmegacontext_lora.so"
    cp -r integration-tests/fixtures/llama integration-tests/fixtures/families "$into/fixtures/"
    cp "$here"/peer/*.py "$into/peer/"
    cp "$here/bench_against_torch.py" "$here/cuda-check.sh" "$into/"
    tar czf "$file" -C "$folder" cuda-check
    rm -r "$folder"
    echo "$file ($(du -m "$file" | cut -f 1) MiB)"
}

if [ "${1:-}" = pack ]; then
    pack "${2:-}"
    exit
fi

out=${1:-$here/out}
[ $# -eq 0 ] || shift
wanted=" $* "
deadline=$((SECONDS + ${CUDA_CHECK_SECONDS:-530}))
mkdir -p "$out"
[ -x "$here/cuda_device" ] || fail "expected cuda_device beside this script, found none (cuda-check.sh pack makes an archive)"

# Libraries of NVIDIA that lie where the dynamic loader does not look: a toolkit's, and those that came with PyTorch.
packages=$(python3 -c 'import site; print(*site.getsitepackages(), site.getusersitepackages())' 2>/dev/null || true)
# shellcheck disable=SC2086 # Several folders.
libraries=$(ls -d /usr/local/cuda*/lib64 $(printf '%s/nvidia/*/lib ' $packages) 2>/dev/null | paste -sd : || true)
export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$libraries
export MEGACONTEXT_FIXTURES=$here/fixtures

probe=$("$here/cuda_device" --exact probing::says --ignored --nocapture 2>&1 | sed -n 's/.*probe: //p')
echo "cuda-check: $probe"
case $probe in
devices*) ;;
*) fail "nothing was run" ;;
esac
if command -v nvidia-smi >/dev/null; then
    nvidia-smi >"$out/nvidia-smi.log" 2>&1 || true
fi

table=()
measured=()
# Logs that stand under the table: of cuda_bench, and of comparisons.
whole=()
compared=()
bad=0

wanted() {
    [[ $wanted =~ ^\ *$ || $wanted == *" $1 "* ]]
}

# there FILE: whether the archive has it; a line of the table where it has not.
there() {
    [ -e "$here/$1" ] || {
        table+=("$1 is not in the archive: what takes it was not run")
        return 1
    }
}

# timed NAME SECONDS COMMAND...: runs it with a log, for so long and no longer than to the deadline. `result` says how it went.
timed() {
    local name=$1 limit=$2 left=$((deadline - SECONDS)) code=0 start=$SECONDS late
    shift 2
    took=0
    : >"$out/$name.log"
    if [ "$left" -lt 5 ]; then
        result="no time left"
        return
    fi
    late="over ${limit}s"
    if [ "$limit" -gt "$left" ]; then
        limit=$left
        late="cut short"
    fi
    echo "cuda-check: $name" >&2
    timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
    took=$((SECONDS - start))
    case $code in
    0) result=passed ;;
    124 | 137) result=$late ;;
    *) result="FAILED ($code)" ;;
    esac
}

# check NAME SECONDS COMMAND...: a line of the table.
check() {
    local result took
    timed "$@"
    case $result in passed | "no time left" | "cut short") ;; *) bad=1 ;; esac
    table+=("$(printf '%-18s %-14s %6ss  %s' "$1" "$result" "$took" \
        "$(grep -hE '^(test result:|========= ERROR SUMMARY)' "$out/$1.log" | tail -n 1 || true)")")
}

# field NAME FILE: a number of the JSON line in it; a dash where there is none.
field() {
    local value
    value=$(sed -n "s/^{.*\"$1\":\([-+0-9.eE]*\)[,}].*/\1/p" "$2" | tail -n 1)
    echo "${value:--}"
}

# measure NAME SECONDS COMMAND...: a line of measurements.
measure() {
    local result took log=$out/$1.log rate
    timed "$@"
    if [ "$result" = passed ]; then
        rate=$(field gflops "$log")
        [ "$rate" = - ] || rate=$(awk "BEGIN { printf \"%.1f\", $rate / 1e3 }")
        measured+=("$(printf '%-24s %10s %10s %10s %15s %10s' "$1" "$(field step_s "$log")" "$(field fb_ms "$log")" \
            "$(field tok_s "$log")" "$(field peak_device_MB "$log")" "$rate")")
    else
        measured+=("$(printf '%-24s %s  %s' "$1" "$result" "$(grep -v '^$' "$log" | tail -n 1 | cut -c 1-160 || true)")")
    fi
}

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
# sanitized NAME TOOL SECONDS PROGRAM TEST...: reads and writes beside memory, races in shared memory, barriers that some threads
# miss, memory that was never written.
sanitized() {
    local name=$1 tool=$2 limit=$3 program=$4
    shift 4
    if [ -z "$sanitizer" ]; then
        table+=("$(printf '%-18s compute-sanitizer is not there: not run' "$name")")
        return
    fi
    check "$name" "$limit" "$sanitizer" --tool "$tool" --error-exitcode 1 --target-processes application-only \
        "$here/$program" --test-threads=1 "$@"
}
launches=(attention::every attention::rows ops:: linear:: layers:: rows::)

# compare NAME SECONDS FLAG...: ours and PyTorch's in turn; a line of the table where there is none of ratios.
compare() {
    local name=peer-$1 limit=$2 result took
    shift 2
    timed "$name" "$limit" "${against[@]}" "$@"
    compared+=("$out/$name.log")
    [ "$result" = passed ] || table+=("$(printf '%-24s %s  %s' "$name" "$result" "$(tail -n 1 "$out/$name.log" | cut -c 1-160)")")
}

bench() {
    local name=$1 limit=$2
    shift 2
    measure "$name" "$limit" "$here/mclora" bench "$@" --device cuda:0 --dtype bf16
}

if wanted device; then check device 120 "$here/cuda_device"; fi
if wanted decoder && there cuda_decoder; then check decoder 120 "$here/cuda_decoder" --nocapture; fi
if wanted memcheck; then sanitized memcheck memcheck 90 cuda_device "${launches[@]}"; fi
if wanted memcheck-decoder && there cuda_decoder; then
    sanitized memcheck-decoder memcheck 90 cuda_decoder every_kind_of_adapter rows_of_documents_are_the_processors_in_rounded \
        texts_are_the_processors training_goes_from_one_device towers_learn_there
fi
if wanted steps && there mclora; then
    # Groups of 4096, and of 8192: a quarter of 32,768, as in LongLoRA.
    for size in 8192:4096 32768:4096 32768:8192 100000:4096 100000:8192; do
        bench "step-1.1B-${size/:/-G}" 60 step --shape 2048,22,32,4,5632,32000 --n "${size%:*}" --group "${size#*:}"
    done
    for size in 8192:4096 32768:4096 32768:8192; do
        bench "step-7B-${size/:/-G}" 90 step --shape 4096,32,32,32,11008,32000 --n "${size%:*}" --group "${size#*:}" --steps 1
    done
fi
if wanted gist && there mclora; then bench gist 60 gist; fi
if wanted attention && there cuda_bench; then
    check attention 90 "$here/cuda_bench"
    whole+=("$out/attention.log")
fi
if wanted peer && there bench_against_torch.py && there mclora; then
    if python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>"$out/torch.log"; then
        against=(python3 "$here/bench_against_torch.py" --device cuda --mclora "$here/mclora" --rounds 1)
        # One size at a time: what ran before the time was up is there.
        compare step 120 --targets G3 --n 8192 --shape 2048,22,32,4,5632,32000
        for n in 8192 32768 131072; do
            for width in 64 128; do
                compare "attention-$n-$width" 90 --targets G1,G2 --n "$n" --head-dim "$width"
            done
        done
    else
        table+=("$(printf '%-18s python3 has no PyTorch that finds the GPU: not run' peer)")
    fi
fi
for tool in racecheck synccheck initcheck; do
    if wanted "$tool"; then sanitized "$tool" "$tool" 60 cuda_device "${launches[@]}"; fi
done

{
    echo "$probe"
    [ ${#table[@]} -eq 0 ] || printf '%s\n' "${table[@]}" | awk '!seen[$0]++'
    if [ ${#measured[@]} -gt 0 ]; then
        echo
        printf '%-24s %10s %10s %10s %15s %10s\n' "mclora bench, bf16" step_s fb_ms tok/s peak_device_MB TFLOP/s
        printf '%s\n' "${measured[@]}"
    fi
    if [ ${#whole[@]} -gt 0 ]; then
        echo
        cat "${whole[@]}"
    fi
    if [ ${#compared[@]} -gt 0 ]; then
        echo
        # One head for all sizes, and behind the rows why some have no figures.
        { grep -h '^|' "${compared[@]}" || true; } | awk '!seen[$0]++'
        grep -hE '^G[0-9] [a-z0-9]+ at ' "${compared[@]}" || true
    fi
} | tee "$out/table.txt"
exit $bad
