#!/usr/bin/env bash
# Runs a command on several processes, with the words of MindFormers' launcher of the same name:
#   bash scripts/msrun/msrun_launcher.sh "run_finetune.py --config X.yaml" 2
# --help tells all forms; --dry-run before the words prints the msrun or torchrun line and starts nothing.
# The python is $PYTHON, that of the active environment, that of the project's .venv, or python3, in this order.
set -euo pipefail

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}
if [[ -z ${PYTHON:-}${VIRTUAL_ENV:-}${CONDA_PREFIX:-} && -x $project/.venv/bin/python3 ]]; then
    python=$project/.venv/bin/python3
fi
export PYTHONPATH=$project${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -c 'import sys; from msft.cli.launch import msrun_launcher; sys.exit(msrun_launcher(sys.argv[1:]))' "$@"
