#!/usr/bin/env bash
# On a machine with a CUDA GPU, in one call of under nine minutes: installs the wheel beside the system's torch, runs the GPU
# tests, compute-sanitizer and the benchmark, and leaves logs, JSON and plots.
#
#   bench/gpu.sh [OUT]      OUT: folder for the results, $OUT or bench-out/gpu by default
#
# PYTHON names the interpreter that has torch (python3); LIMIT the seconds for all (530). Stages come in the order of what
# they are worth: one that is out of time is cut off, and what no time is left for is named. The exit status is 0 where every
# stage passed. Nothing is downloaded: a wheel in dist/ is taken if there is one, else one is built with the cmake, ninja and
# nvcc at hand. The installation goes to a folder of its own, so the system's Python stays as it is.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
root=$PWD
out=$(realpath -m "${1:-${OUT:-bench-out/gpu}}")
python=${PYTHON:-python3}
limit=${LIMIT:-530}
mkdir -p "$out" || exit 1
: >"$out/stages.tsv"
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT

# --- stages -----------------------------------------------------------------------------------------------------------------
record() { # NAME OUTCOME SECONDS
  printf '%s\t%s\t%s\n' "$1" "$2" "$3" >>"$out/stages.tsv"
}

within() { # SECONDS: so many, or what is left of LIMIT
  echo $(($1 < limit - SECONDS ? $1 : limit - SECONDS))
}

# stage NAME SECONDS COMMAND...: runs it for at most so long, or what is left of LIMIT. With `quiet` set only its log has
# what it prints, for those that run side by side; with `extra` set it may stay undone.
stage() {
  local name=$1 most start=$SECONDS status outcome
  most=$(within "$2")
  shift 2
  if [ "$most" -lt 5 ]; then
    record "$name" "${extra:+extra, }not run" 0
    return 1
  fi
  printf '\n--- %s: at most %s s\n' "$name" "$most"
  if [ -n "${quiet:-}" ]; then
    timeout --kill-after=5 "$most" "$@" >"$out/$name.log" 2>&1
    status=$?
  else
    timeout --kill-after=5 "$most" "$@" 2>&1 | tee "$out/$name.log"
    status=${PIPESTATUS[0]}
  fi
  case $status in
    0) outcome=passed ;;
    124 | 137) outcome="OUT OF TIME" ;;
    *) outcome="FAILED ($status)" ;;
  esac
  # Where a machine's driver lets no debugger in, the sanitizer says so and checks nothing.
  if [ "$status" -ne 0 ] && grep -q 'Device not supported' "$out/$name.log"; then outcome=unavailable; fi
  record "$name" "${extra:+extra, }$outcome" $((SECONDS - start))
  [ "$status" -eq 0 ]
}

finish() {
  printf '\n%-28s %-20s %s\n' stage outcome seconds
  while IFS=$'\t' read -r name outcome seconds; do
    printf '%-28s %-20s %s\n' "$name" "$outcome" "$seconds"
  done <"$out/stages.tsv" | tee "$out/stages.txt"
  printf '%s s of %s\n' "$SECONDS" "$limit"
  cut -f 2 "$out/stages.tsv" | grep -vE '^(passed|unavailable|extra, .*)$' >/dev/null && exit 1
  exit 0
}

# --- installation -----------------------------------------------------------------------------------------------------------
"$python" - <<'CHECK' || exit 1
import sys
import torch
if not torch.cuda.is_available():
    sys.exit("bench/gpu.sh: torch finds no CUDA GPU here; this script is for a machine that has one")
print("GPU:", torch.cuda.get_device_name(), "torch:", torch.__version__)
CHECK

wheel=$(find dist -name 'mmkernels-*.whl' 2>/dev/null | sort | tail -n 1)
if [ -z "$wheel" ]; then
  stage build 280 "$python" -m pip wheel -q --no-deps --no-build-isolation --wheel-dir "$site/dist" . || finish
  wheel=$(find "$site/dist" -name 'mmkernels-*.whl')
fi
stage install 60 "$python" -m pip install -q --no-index --no-deps --target "$site/packages" "$wheel" || finish
export PYTHONPATH="$site/packages:$root/python_tests${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
export XDG_CACHE_HOME="$site/cache" # the peaks of this machine as it is today
cd "$out" || exit 1                 # not in the source folder, whose mmkernels has no libraries

stage info 60 "$python" -c 'import mmkernels as mk; print(mk.info())' || finish
stage gpu 20 nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv

# --- tests and benchmark ------------------------------------------------------------------------------------------------------
# script NAME SECONDS BACKEND SCRIPT: what takes too long says itself which of its jobs are left.
script() {
  local library=1
  [ "$3" = cuda ] || library=0
  stage "$1" "$2" env MMKERNELS_CUDA_LIBRARY="$library" \
    "$python" "$root/python_tests/$4.py" "$3" --seconds $(($(within "$2") - 20))
}

# bench NAME SECONDS ARGUMENTS: of mmkernels.bench.command.run; cases beyond the time are named in its results.
bench() {
  stage "$1" "$2" "$python" -c "
from pathlib import Path
from mmkernels.bench.command import run
run(device='cuda', json_path=Path('$1.json'), plot_folder=Path('plots-$1'), limit_s=max(0, $(within "$2") - 45), $3)"
}

# Out-of-bounds accesses show where every tensor has memory of its own.
sanitize() { # TOOL SECONDS BACKEND OPTIONS...
  local tool=$1 most=$2 backend=$3 library=1
  shift 3
  [ "$backend" = cuda ] || library=0
  quiet=1 stage "sanitize-$tool-$backend" "$most" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 MMKERNELS_CUDA_LIBRARY="$library" \
    "$sanitizer" --tool "$tool" --error-exitcode 1 --report-api-errors no --target-processes application-only \
    "$python" "$root/python_tests/gpu_sanitize.py" "$backend" "$@"
}

script suite-cuda 160 cuda gpu_suite
script modes-cuda 100 cuda gpu_modes
bench bench-judged 200 "case='.gpu.', seconds=0.3"
export MMKERNELS_HOPPER_ATTENTION=1 # which is not the default before these two have said that it should be
script hopper-cuda 60 cuda gpu_hopper
bench bench-hopper 60 "case='attention.gpu.L', seconds=0.3"
unset MMKERNELS_HOPPER_ATTENTION
script suite-triton 50 triton gpu_suite
sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
if [ -x "$sanitizer" ]; then
  for backend in cuda triton; do
    sanitize memcheck 80 "$backend" &
    sanitize racecheck 80 "$backend" --brief &
  done
  wait
else
  record sanitize unavailable 0
fi
script huge-cuda 80 cuda gpu_huge
script modes-triton 60 triton gpu_modes
script huge-triton 60 triton gpu_huge
extra=1 MMKERNELS_CUDA_LIBRARY=0 bench bench-triton 60 "case='.gpu.', family='token_roll', seconds=0.3" # of families with both
extra=1 bench bench-rest 600 "dtypes=['bfloat16'], seconds=0.2"
finish
