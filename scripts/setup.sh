#!/usr/bin/env bash
# Sets up .venv in the checkout: torch first and pinned (unpinned, pip may fetch a CUDA build of several GB), then the
# project with its test tools. A stamp file makes the second call instant; a changed pyproject.toml or torch redoes it.
#
#   PYTHON       the interpreter, 3.11 to 3.13 (default python3)
#   TORCH        what to install as torch (default torch==2.13.0)
#   TORCH_INDEX  the index to take torch from, for example https://download.pytorch.org/whl/cpu (default: pip's own)
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
torch=${TORCH:-torch==2.13.0}
index=${TORCH_INDEX:-}

stamp=.venv/.mucs-setup
wanted="$torch $index $(cksum < pyproject.toml)"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    exit 0
fi

if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; then
    echo "setup: $python is $("$python" --version 2>&1); expected Python 3.11 to 3.13. Set PYTHON=/path/to/python3.11." >&2
    exit 2
fi

[ -x .venv/bin/python ] || "$python" -m venv .venv
pip="env PIP_DISABLE_PIP_VERSION_CHECK=1 .venv/bin/python -m pip install --quiet"
echo "setup: installing $torch into .venv" >&2
$pip ${index:+--index-url "$index"} "$torch"
echo "setup: installing mucs and its dependencies" >&2
$pip --editable '.[test]'
echo "$wanted" > "$stamp"
echo "setup: done" >&2
