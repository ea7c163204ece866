#!/usr/bin/env bash
# Measurements on one GPU in less than ten minutes: prints a table, and writes benchmarks/results/gpu.json.
#   benchmarks/gpu.sh                                  # 0.6B and 4B Qwen3 shapes with random weights
#   benchmarks/gpu.sh --vllm .venv-vllm/bin/python     # with vLLM, from its own environment
#   benchmarks/gpu.sh --tiny --out tiny.json           # on a CPU: test of the script itself
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-$here/../.venv/bin/python}"
export HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE
exec "$python" "$here/gpu.py" "$@"
