#!/usr/bin/env bash
# Compiles kernels/cu/*.cu ahead of time for sm_80 and sm_90, and says what came out: registers, stack and spills of each
# kernel, shared memory of attention, tensor-core instructions and 128-bit accesses in the machine code.
#
#   scripts/cuda-build.sh [FOLDER]      # default target/cuda-kernels: NAME.fatbin, NAME.log, report.txt, the sources
#
# MEGACONTEXT_CUDA_FATBINS=FOLDER puts the fatbins into the library; the sources beside them say what they were made of.
#
# Uses nvcc and cuobjdump on PATH; without nvcc it asks scripts/cuda-toolchain.sh for one. Fails when a kernel does not
# compile, when ptxas warns of anything, or when the 16-bit attention kernels came out without tensor cores.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
out=${1:-$root/target/cuda-kernels}

fail() {
    echo "cuda-build: $*" >&2
    exit 1
}

if ! command -v nvcc >/dev/null; then
    environment=$("$root/scripts/cuda-toolchain.sh")
    eval "$environment"
fi
command -v cuobjdump >/dev/null || fail "expected cuobjdump beside nvcc, found none (scripts/cuda-toolchain.sh installs one)"

mkdir -p "$out"
# First the sources, and no code of others beside them.
rm -f "$out"/*.fatbin
cp "$root"/kernels/cu/*.cu "$root"/kernels/cu/*.cuh "$out"
report=$out/report.txt
# A driver takes code of its own major version and of older ones.
nvcc --version | sed -n 's/.*release \([0-9]*\)\..*/\1/p' >"$out/cuda-major"
[ -s "$out/cuda-major" ] || fail "expected a release in what nvcc --version says, got: $(nvcc --version)"
nvcc --version | tail -n 1 >"$report"

# How many lines of a file match. grep's 1 for none is no error here.
count() { grep -cE "$1" "$2" || true; }

for source in "$root"/kernels/cu/*.cu; do
    name=$(basename "$source" .cu)
    echo "cuda-build: $name" >&2
    nvcc -std=c++17 -O3 -fatbin -Xptxas -v \
        -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90 \
        -o "$out/$name.fatbin" "$source" >"$out/$name.log" 2>&1 || fail "$name does not compile: $(head -n 20 "$out/$name.log")"
    if grep -q -iE '\b(warning|error)\b' "$out/$name.log"; then
        fail "$name: $(grep -iE '\b(warning|error)\b' "$out/$name.log")"
    fi
    {
        echo
        echo "$name.fatbin, $(stat -c %s "$out/$name.fatbin") bytes"
        printf '  %-40s %-6s %9s %6s %7s %7s\n' kernel target registers stack stores loads
        # One kernel is three lines: its name and target, stack and spills, registers.
        awk -F"'" '
            /Compiling entry function/ { kernel = $2; target = $4 }
            /bytes stack frame/ {
                match($0, /[0-9]+ bytes stack/); stack = substr($0, RSTART, RLENGTH) + 0
                match($0, /[0-9]+ bytes spill stores/); stores = substr($0, RSTART, RLENGTH) + 0
                match($0, /[0-9]+ bytes spill loads/); loads = substr($0, RSTART, RLENGTH) + 0 }
            /Used [0-9]+ registers/ { match($0, /Used [0-9]+/)
                printf "  %-40s %-6s %9d %6d %7d %7d\n", kernel, target, substr($0, RSTART + 5, RLENGTH - 5), stack, stores, loads }
        ' "$out/$name.log" | sort
        for target in sm_80 sm_90; do
            cuobjdump -sass -arch "$target" "$out/$name.fatbin" >"$out/$name.$target.sass"
            code=$out/$name.$target.sass
            echo "  $target: $(count HMMA "$code") HMMA, $(count LDSM "$code") LDSM," \
                "$(count 'LDGSTS[.A-Z0-9]*\.128' "$code") 128-bit global-to-shared copies," \
                "$(count 'LDG\.[.A-Z0-9]*128' "$code") 128-bit and $(count 'LDG\.' "$code") global loads in all," \
                "$(count 'STG\.[.A-Z0-9]*128' "$code") 128-bit and $(count 'STG\.' "$code") stores"
        done
    } >>"$report"
done

# Every 16-bit kernel with products, by name: a fallback that compiles but multiplies one by one must not pass for done.
for name in attention_forward attention_backward; do
    for target in sm_80 sm_90; do
        bare=$(awk '/Function : / { kernel = $3 } /HMMA/ { tensor[kernel] = 1 } { seen[kernel] = 1 }
            END { for (k in seen) if (k ~ /^attention_(forward|queries|keys)_b?f16/ && !tensor[k]) print k }' "$out/$name.$target.sass")
        [ -z "$bare" ] || fail "without tensor cores for $target: $bare"
    done
done

if compiler=$(command -v c++ || command -v g++); then
    "$compiler" -std=c++17 -O1 -w -o "$out/shared" "$root/kernels/cu/emulate/shared.cpp"
    { echo; echo "attention: bytes of shared memory of a block, and its tiles"; "$out/shared"; } >>"$report"
fi
cat "$report"
