#!/usr/bin/env bash
# Installs a wheel of this package where there is no compiler, and runs an operator of it:
#   bash tests/wheel.sh dist/*.whl
# The packages that it needs are those of the `python` on PATH; nothing is downloaded.
set -euo pipefail
wheel=$(realpath "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
packages=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

python -m venv --without-pip "$work/venv"
# By a line in a .pth file: the packages there, but not what that folder's own .pth files add, as
# this package from its source.
site=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$packages" >"$site/packages.pth"
python -m pip --python "$work/venv/bin/python" install --quiet --no-index --no-deps --ignore-installed "$wheel"

mkdir "$work/path"
cd "$work"
env -i PATH="$work/path" HOME="$work" "$work/venv/bin/python" - <<'PYTHON'
import shutil
import sys

import torch

import dsd_fast
from dsd_fast._backend import extension

assert not any(map(shutil.which, ("cc", "c++", "gcc", "nvcc", "cmake")))
assert dsd_fast.__file__.startswith(sys.prefix), f"not the wheel's: {dsd_fast.__file__}"
grid = dsd_fast.HashGrid(4, 2, 10, 4, 1.5)
value, jacobian = grid.value_and_jacobian(torch.rand(100, 3))
assert value.shape == (100, 8) and jacobian.shape == (100, 8, 3)
built = extension().build_info()
print(f"{dsd_fast.__version__}: runs, with CUDA for {built['cuda_archs'] or 'nothing'}")
PYTHON
