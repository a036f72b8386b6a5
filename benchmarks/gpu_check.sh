#!/usr/bin/env bash
# One command for a machine with a card: is the GPU code right there, and how fast is it?
#
#   bash benchmarks/gpu_check.sh [SECONDS] [STEP...]   default 560 seconds, every step (listed in gpu_check.py)
#   bash benchmarks/gpu_check.sh --dry [STEP...]       the same steps in small on a CPU: proves the command, measures nothing
#
# Environment: PYTHON (python3), OUT (gpu-check here): results.jsonl, log.txt, summary.txt; TRITON_CACHE_DIR.
# Needs no network and nothing that is not under version control or installed.
set -u
cd "$(dirname "$0")/.." || exit 1
export OUT=${OUT:-$PWD/gpu-check}
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
ulimit -c 0 # the core of a process that maps a card takes minutes to write
# exec: a signal for this process must reach the one that writes the summary.
exec "${PYTHON:-python3}" benchmarks/gpu_check.py run "$@"
