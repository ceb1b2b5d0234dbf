#!/usr/bin/env bash
# Runs the operators' CUDA tests under compute-sanitizer, which the CUDA toolkit brings:
#   bash tests/sanitize_cuda.sh
# memcheck sees every CUDA test. racecheck, which looks for races in shared memory, is many times
# slower: it sees our kernels only, each once, in small tests.
set -euo pipefail
cd "$(dirname "$0")/.."

sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
[ -x "$sanitizer" ] || { echo "no compute-sanitizer: set CUDA_HOME or PATH" >&2; exit 1; }
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { echo "torch sees no CUDA GPU" >&2; exit 1; }

# torch's caching allocator would hide an access that ends in another tensor's memory.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
check() {
    local tool=$1
    shift
    # shellcheck disable=SC2086  # a tool with its options
    "$sanitizer" --tool $tool --error-exitcode 1 python -m pytest -q -p no:cacheprovider "$@"
}

check memcheck -k "cuda and not compiles_without_graph_breaks" \
    tests/test_{adam,field_op,hashgrid,sh,march,composite,prune,rasterize,occupancy,op_properties}.py

check memcheck -k "grid or field or sums" tests/test_determinism.py

# Two and four features; with and without normals. The names of our kernels hold their namespace.
check "racecheck --kernel-name kernel_substring=dsd" \
    "tests/test_hashgrid.py::test_kernels_agree_with_the_reference[cuda-None-65-F2]" \
    "tests/test_hashgrid.py::test_kernels_agree_with_the_reference[cuda-None-65-F4]" \
    "tests/test_determinism.py::test_the_field_gives_the_same_bits[few-True-True]" \
    "tests/test_sh.py::test_kernels_agree_with_the_reference_in_float64[cuda-257]" \
    "tests/test_march.py::test_same_samples_as_reference[cuda-grid=7-occupied=0.5]" \
    "tests/test_march.py::test_packed_samples_of_rays_with_many_runs[cuda]" \
    "tests/test_prune.py::test_same_samples_as_reference[cuda-13 rays]" \
    "tests/test_composite.py::test_orientation[cuda-density=50.0]" \
    "tests/test_composite.py::test_forward_and_gradients[cuda-density=50.0]" \
    "tests/test_composite.py::test_golden[cuda-compiled]" \
    "tests/test_composite.py::test_visibility[cuda-0.001]" \
    "tests/test_rasterize.py::test_same_triangles_as_reference[cuda-8-4]" \
    "tests/test_rasterize.py::test_same_triangles_of_a_soup[cuda-33-2.0]" \
    "tests/test_occupancy.py::test_update[cuda-1000-333]" \
    "tests/test_occupancy.py::test_threshold[cuda-above-1024]"
