#!/usr/bin/env bash
# Installs the real MindFormers 1.3.2 in .venv-mindformers (3 GB, once) and proves the file exchange with it.
# Usage: scripts/test_mindformers.sh [pytest arguments]      PYTHON=python3.11 picks the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=.venv-mindformers
requirements=tests/mindformers/requirements-mindformers.txt

if [ ! -x .venv/bin/python ]; then
    echo "There is no .venv yet: run 'make test' first" >&2
    exit 2
fi

# The copy of the requirements is written last, so an interrupted installation is repeated.
if ! cmp -s "$requirements" "$environment/installed.txt"; then
    echo "Installing MindFormers 1.3.2 into $environment (about 3 GB, a minute or more)"
    rm -rf "$environment"
    "${PYTHON:-python3.11}" -m venv "$environment"
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
    cp "$requirements" "$environment/installed.txt"
fi

exec .venv/bin/python -m pytest -n 0 -m mindformers tests/mindformers "$@"
