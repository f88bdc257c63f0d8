#!/usr/bin/env bash
# Everything a GPU can prove, in one command and under nine minutes, on a bare machine (no network needed):
#
#   benchmarks/gpu_check.sh DIR                                    build here, for this GPU
#   RCU_OPS_LIBRARY=/path/librcu_ops.so benchmarks/gpu_check.sh DIR   with kernels built elsewhere
#   PYTHON=python3.12 benchmarks/gpu_check.sh DIR                  another Python
#   SECONDS_IN_ALL=300 benchmarks/gpu_check.sh DIR --no-compile    in less time; words after DIR go to rcu-ops bench
#
# DIR gets gpu_check.json, gpu_check.log and gpu_check.png. See benchmarks/gpu_check.py.
set -euo pipefail
directory=${1:+$(realpath -m -- "$1")}
shift $(($# ? 1 : 0))
# Given as they are seen from where this was called.
python=${PYTHON:-python3}
case $python in */*) python=$(realpath -s -m -- "$python") ;; esac
if [ -n "${RCU_OPS_LIBRARY:-}" ]; then
  RCU_OPS_LIBRARY=$(realpath -m -- "$RCU_OPS_LIBRARY")
  export RCU_OPS_LIBRARY
fi
cd "$(dirname "$0")/.."
exec "$python" -m benchmarks.gpu_check ${directory:+"$directory"} "$@"
