#!/usr/bin/env bash
# A CUDA compiler for machines without a system CUDA: NVIDIA's own wheels in a virtual environment, nothing installed
# outside the folder. No GPU and no driver are needed to build.
#
#   eval "$(scripts/cuda-toolchain.sh)"            # into target/cuda-toolchain, once; then at no cost
#   scripts/cuda-toolchain.sh [FOLDER]             # elsewhere; the variable CUDA_TOOLCHAIN does the same
#
# Prints the environment to source on stdout (it is kept in FOLDER/env.sh), progress and errors on stderr.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-${CUDA_TOOLCHAIN:-$root/target/cuda-toolchain}}

fail() {
    echo "cuda-toolchain: $*" >&2
    exit 1
}

# Versions belong together: the compiler refuses headers of another release, and 13.0 is what driver 580 runs. The two
# disassemblers, which only read, have no wheels of 13.0.
wheels=(
    nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96
    nvidia-cuda-nvrtc==13.0.88 nvidia-cuda-cccl==13.0.85 nvidia-cublas==13.0.2.14 nvidia-curand==10.4.0.35
    nvidia-cuda-cuobjdump==13.2.51 nvidia-cuda-nvdisasm==13.2.51
)
# What was asked for is what the stamp holds, so that a changed list is installed again.
want="${wheels[*]}"

if [ "$(cat "$folder/stamp" 2>/dev/null || true)" = "$want" ] && [ -f "$folder/env.sh" ]; then
    cat "$folder/env.sh"
    exit 0
fi

command -v python3 >/dev/null || fail "expected python3 on PATH, found none"
python3 -c 'import venv, ensurepip' 2>/dev/null ||
    fail "expected python3 with venv and pip (Debian: python3-venv), found $(python3 --version) without them"
cc=$(command -v gcc || command -v cc) || fail "expected gcc on PATH (nvcc compiles host code with it), found none"

mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
rm -f "$folder/stamp"
echo "cuda-toolchain: installing into $folder" >&2
python3 -m venv "$folder/venv" >&2 || fail "python3 could not make a virtual environment in $folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "${wheels[@]}" >&2 ||
    fail "pip could not install NVIDIA's wheels (see above): is the package index reachable?"

home=$("$folder/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/nvidia/cu13
[ -x "$home/bin/nvcc" ] || fail "expected $home/bin/nvcc after installing, found none"

# Linkers look for names without versions, and candle's build for lib64.
for library in "$home"/lib/lib*.so.*; do
    name=${library##*/}
    ln -sf "$name" "$home/lib/${name%%.so.*}.so"
done
ln -sfn lib "$home/lib64"

# The driver's library comes with a driver only. What links against it needs the names and nothing behind them, and a
# program must never find this stub when it runs: it lies in a folder of its own, under the name for linkers alone.
mkdir -p "$home/lib/stubs"
grep -hoE '\bcu[A-Z][A-Za-z0-9]*(_v[0-9]+|_ptsz|_ptds)*[[:space:]]*\(' "$home/include/cuda.h" |
    tr -d ' (' | sort -u | sed 's/.*/void &(void) {}/' >"$folder/stub.c"
# cuda.h renames entry points to their versioned form by macros; the linker sees those.
grep -oE '^[[:space:]]*#[[:space:]]*define[[:space:]]+cu[A-Z][A-Za-z0-9]*[[:space:]]+[A-Za-z_0-9()]+' "$home/include/cuda.h" |
    grep -oE 'cu[A-Z][A-Za-z0-9]*_v[0-9]+' | sort -u | sed 's/.*/void &(void) {}/' >>"$folder/stub.c"
sort -u -o "$folder/stub.c" "$folder/stub.c"
"$cc" -shared -fPIC -w -Wl,-soname,libcuda.so.1 -o "$home/lib/stubs/libcuda.so" "$folder/stub.c" ||
    fail "$cc could not build the stub libcuda.so from $folder/stub.c"

cat >"$folder/env.sh" <<END
export CUDA_HOME='$home' CUDA_PATH='$home' CUDA_ROOT='$home' CUDA_TOOLKIT_ROOT_DIR='$home'
export CUDA_COMPUTE_CAP="\${CUDA_COMPUTE_CAP:-90}"
export PATH='$home/bin':"\$PATH"
export LIBRARY_PATH='$home/lib:$home/lib/stubs'"\${LIBRARY_PATH:+:\$LIBRARY_PATH}"
END
echo "$want" >"$folder/stamp"
cat "$folder/env.sh"
