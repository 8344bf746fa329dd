#!/usr/bin/env bash
# Everything there is to check on a machine with a GPU, in one call, without Rust and without a network.
#
#   scripts/cuda-check.sh pack [FILE]     # here: build tests and benchmark, put them and this script into FILE
#                                         # (default target/cuda-check.tar.gz); with MEGACONTEXT_CUDA_FATBINS the
#                                         # machine with the GPU needs no NVRTC
#   tar xzf cuda-check.tar.gz && cuda-check/cuda-check.sh [FOLDER]
#                                         # there: run them, logs into FOLDER (default cuda-check/out), one table at the end
#
# Fails when a check fails. Without a driver or a device it says so and runs nothing.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)

fail() {
    echo "cuda-check: $*" >&2
    exit 1
}

pack() {
    local root file folder text test bench
    root=$(cd "$here/.." && pwd)
    file=${1:-$root/target/cuda-check.tar.gz}
    folder=$(mktemp -d)
    cd "$root"
    if [ -z "${MEGACONTEXT_CUDA_FATBINS:-}" ]; then
        echo "cuda-check: without MEGACONTEXT_CUDA_FATBINS the other machine needs NVRTC of CUDA 12 or 13" >&2
    fi
    # cargo names what it built: "Executable tests/cuda_device.rs (PATH)".
    text=$(cargo test --workspace --features megacontext-kernels/cuda --test cuda_device --no-run 2>&1) || fail "$text"
    test=$(sed -n 's/.*tests\/cuda_device\.rs (\(.*\))$/\1/p' <<<"$text")
    [ -x "$test" ] || fail "expected the name of a program from cargo, got: $text"
    text=$(cargo build --workspace --features megacontext-kernels/cuda --example cuda_bench 2>&1) || fail "$text"
    bench=${CARGO_TARGET_DIR:-target}/debug/examples/cuda_bench
    [ -x "$bench" ] || fail "expected $bench from cargo, found none"
    mkdir -p "$folder/cuda-check" "$(dirname "$file")"
    cp "$test" "$folder/cuda-check/cuda_device"
    cp "$bench" "$folder/cuda-check/cuda_bench"
    cp "$here/cuda-check.sh" "$folder/cuda-check/"
    tar czf "$file" -C "$folder" cuda-check
    rm -r "$folder"
    echo "$file"
}

if [ "${1:-}" = pack ]; then
    pack "${2:-}"
    exit
fi

out=${1:-$here/out}
mkdir -p "$out"
for program in cuda_device cuda_bench; do
    [ -x "$here/$program" ] || fail "expected $program beside this script, found none (cuda-check.sh pack makes an archive)"
done

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
bad=0
# check NAME COMMAND...: its log, and a line of the table.
check() {
    local name=$1 start=$SECONDS result
    shift
    echo "cuda-check: $name" >&2
    if "$@" >"$out/$name.log" 2>&1; then
        result=passed
    else
        result="FAILED ($?)"
        bad=1
    fi
    table+=("$(printf '%-12s %-12s %6ss  %s' "$name" "$result" $((SECONDS - start)) \
        "$(grep -hE '^(test result:|========= ERROR SUMMARY)' "$out/$name.log" | tail -n 1)")")
}

check device "$here/cuda_device"
if sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null); then
    # Reads and writes beside memory, races in shared memory, barriers that some threads miss, memory that was never written.
    for tool in memcheck racecheck synccheck initcheck; do
        check "$tool" "$sanitizer" --tool "$tool" --error-exitcode 1 --target-processes application-only \
            "$here/cuda_device" --test-threads=1 attention::every attention::rows ops:: linear::
    done
else
    table+=("compute-sanitizer is not there: not run")
fi
check bench "$here/cuda_bench"

{
    echo "$probe"
    printf '%s\n' "${table[@]}"
    echo
    cat "$out/bench.log"
} | tee "$out/table.txt"
exit $bad
