#!/usr/bin/env bash
# Everything a GPU can prove, in one command and under nine minutes, on a bare machine (no network needed):
#
#   benchmarks/gpu_check.sh DIR                                    build here, for this GPU
#   RCU_OPS_LIBRARY=/path/librcu_ops.so benchmarks/gpu_check.sh DIR   with kernels built elsewhere
#   PYTHON=python3.12 benchmarks/gpu_check.sh DIR                  another Python
#
# DIR gets gpu_check.json, gpu_check.log and gpu_check.png. See benchmarks/gpu_check.py.
set -euo pipefail
directory=${1:+$(realpath -m -- "$1")}
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m benchmarks.gpu_check ${directory:+"$directory"}
