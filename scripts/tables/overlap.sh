#!/usr/bin/env bash
# Which top images methods repeat across queries, and share with each other on one query; a table a seed.
#
#   scripts/tables/overlap.sh experiment=cifar10_dit_edm [run=outputs/main] [KEY=VALUE ...]
#
# With run= of main.sh its scores are used. Environment: see common.sh.
. "$(dirname "$0")/common.sh"
for seed in "${seeds[@]}"; do
    scored "$seed"
    run=$(run_of "$seed")
    evaluate run="$run" evaluation=overlap
    mkdir -p "$base/tables"
    for kind in md csv tex; do cp "$run/evaluate/overlap/table.$kind" "$base/tables/overlap-seed-$seed.$kind"; done
    cat "$base/tables/overlap-seed-$seed.md"
done
