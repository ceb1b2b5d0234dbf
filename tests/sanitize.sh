#!/usr/bin/env bash
# Runs the operators' CPU tests under the address and undefined-behaviour sanitizers (GCC, Linux):
#   bash tests/sanitize.sh [pytest arguments]
# Works on a copy of the package below build/, so that the installed module stays as it is.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$PWD/build/sanitize
mkdir -p "$work/site"
rm -rf "$work/site/dsd_fast"
mkdir "$work/site/dsd_fast"
tar -c --exclude='*.so' --exclude=assets --exclude=./kernels --exclude=__pycache__ -C dsd_fast . |
    tar -x -C "$work/site/dsd_fast"
cp -r kernels "$work/site/dsd_fast/kernels"

cmake -S . -B "$work/cmake" -G Ninja -DDSD_CUDA=OFF -DDSD_SANITIZE=address,undefined \
    -DPython_EXECUTABLE="$(command -v python)" \
    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$work/site/dsd_fast"
cmake --build "$work/cmake"

# Python itself is not instrumented: the run-time libraries come first, the leaks are Python's own.
preload=
for library in libasan.so libubsan.so libstdc++.so; do
    preload="$preload $(gcc -print-file-name=$library)"
done
tests=("$@")
[ $# -gt 0 ] || tests=(tests/test_{adam,field_op,hashgrid,sh,march,composite,prune,rasterize,occupancy,op_properties}.py)
# No `python -m pytest`: it would put this folder, and with it the ordinary module, first.
PYTHONPATH="$work/site" LD_PRELOAD="${preload# }" ASAN_OPTIONS=detect_leaks=0 \
    UBSAN_OPTIONS=print_stacktrace=1 CUDA_VISIBLE_DEVICES= \
    pytest -q -p no:cacheprovider -k "not compiles_without_graph_breaks" "${tests[@]}"
