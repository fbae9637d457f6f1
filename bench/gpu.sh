#!/usr/bin/env bash
# On a machine with a CUDA GPU: installs the wheel beside the system's torch, runs the GPU tests and the benchmark, and
# leaves JSON and plots.
#
#   bench/gpu.sh [OUT]      OUT: folder for the results, bench-out/gpu by default
#
# PYTHON names the interpreter that has torch (python3). Nothing is downloaded: a wheel in dist/ is taken if there is one,
# else one is built with the cmake, ninja and nvcc at hand. The installation goes to a folder of its own, so the system's
# Python stays as it is.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-bench-out/gpu}")
python=${PYTHON:-python3}
mkdir -p "$out"

"$python" - <<'CHECK'
import sys
import torch
if not torch.cuda.is_available():
    sys.exit("bench/gpu.sh: torch finds no CUDA GPU here; this script is for a machine that has one")
print("GPU:", torch.cuda.get_device_name(), "torch:", torch.__version__)
CHECK

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
wheel=$(find dist -name 'mmkernels-*.whl' 2>/dev/null | sort | tail -n 1 || true)
if [ -z "$wheel" ]; then
  "$python" -m pip wheel -q --no-deps --no-build-isolation --wheel-dir "$site/dist" . 2>&1 | tee "$out/build.log"
  wheel=$(find "$site/dist" -name 'mmkernels-*.whl')
fi
"$python" -m pip install -q --no-index --no-deps --target "$site/packages" "$wheel"
export PYTHONPATH="$site/packages:$PWD/python_tests${PYTHONPATH:+:$PYTHONPATH}"
root=$PWD
cd "$out"  # not in the source folder, whose mmkernels has no libraries

"$python" -c 'import mmkernels as mk; print(mk.info())' | tee info.txt
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee gpu.csv
status=0
"$python" "$root/python_tests/gpu_suite.py" cuda 2>&1 | tee suite-cuda.log || status=1
MMKERNELS_CUDA_LIBRARY=0 "$python" "$root/python_tests/gpu_suite.py" triton 2>&1 | tee suite-triton.log || status=1
"$python" -m mmkernels bench --device cuda --json bench-cuda.json --plot plots 2>&1 | tee bench-cuda.log || status=1
MMKERNELS_CUDA_LIBRARY=0 "$python" -m mmkernels bench --device cuda --json bench-triton.json 2>&1 |
  tee bench-triton.log || status=1
exit "$status"
