#!/usr/bin/env bash
# Builds the wheel, installs it in a new environment outside the checkout, and runs it from another folder: what a user
# without the checkout gets. MUCS_CHECK_WHEEL_DEMO=1 also runs the whole demo (minutes).
set -euo pipefail
cd "$(dirname "$0")/.."
checkout=$PWD

torch=${TORCH:-torch==2.13.0}
index=${TORCH_INDEX:-}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

rm -rf build # a stale one puts deleted files back into the wheel
.venv/bin/python -m build --wheel --outdir "$scratch/dist" . > "$scratch/build.log" || { cat "$scratch/build.log" >&2; exit 1; }
rm -rf build

"${PYTHON:-python3}" -m venv "$scratch/venv"
pip="env PIP_DISABLE_PIP_VERSION_CHECK=1 $scratch/venv/bin/python -m pip install --quiet"
$pip ${index:+--index-url "$index"} "$torch"
$pip "$scratch"/dist/mucs-*.whl

mkdir "$scratch/elsewhere"
cd "$scratch/elsewhere"
mucs=$scratch/venv/bin/mucs
where=$("$scratch/venv/bin/python" -c 'import mucs_cli; print(mucs_cli.__file__)')
case $where in "$checkout"/*) echo "check_wheel: imported from the checkout: $where" >&2; exit 1 ;; esac

"$mucs" --version
"$mucs" --help > /dev/null
"$mucs" run experiment=digits run=outputs/wheel data.limit=64 training.num_steps=20 training.warmup_steps=5 \
    sampler.num_steps=3 queries.num=2 noise_bank.num_draws=4 unlearning.max_steps=2 unlearning.retain_batch_size=16 \
    unlearning.forget_batch_size=16 report.k=3 device=cpu
test -s outputs/wheel/report/index.html
[ "$(ls)" = outputs ] || { echo "check_wheel: mucs left files where it was called: $(ls)" >&2; exit 1; }

if [ "${MUCS_CHECK_WHEEL_DEMO:-0}" = 1 ]; then
    "$mucs" run experiment=digits
fi
echo "check_wheel: the wheel works outside the checkout"
