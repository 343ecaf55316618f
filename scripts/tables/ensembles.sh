#!/usr/bin/env bash
# Ensembles of every two methods, judged by the linear datamodeling score beside their members; a table a seed.
#
#   scripts/tables/ensembles.sh experiment=cifar10_dit_edm [run=outputs/main] [KEY=VALUE ...]
#
# With run= of main.sh its scores and retrained models are used. Environment: see common.sh, and
#
#   METHODS  the methods of the members (default "mucs dtrak pixel")
#   MEMBERS  the members, folders below score/ (default: METHODS; others where settings name a variant)
#   LDS      overrides of evaluation=lds; give those of main.sh to share its models
METHODS=${METHODS:-mucs dtrak pixel}
. "$(dirname "$0")/common.sh"
read -ra members <<< "${MEMBERS:-${methods[*]%%:*}}"
read -ra lds <<< "${LDS:-}"
for seed in "${seeds[@]}"; do
    scored "$seed"
    run=$(run_of "$seed")
    for ((first = 0; first < ${#members[@]}; first++)); do
        for ((second = first + 1; second < ${#members[@]}; second++)); do
            mucs score run="$run" method=ensemble method.members="[${members[first]},${members[second]}]"
        done
    done
    evaluate run="$run" evaluation=lds "${lds[@]}"
    mkdir -p "$base/tables"
    for kind in md csv tex; do cp "$run/evaluate/lds/table.$kind" "$base/tables/ensembles-seed-$seed.$kind"; done
    cat "$base/tables/ensembles-seed-$seed.md"
done
