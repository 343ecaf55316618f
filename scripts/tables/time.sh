#!/usr/bin/env bash
# What a method costs: amortised minutes a query, each method from scratch on the same model and queries.
#
#   scripts/tables/time.sh experiment=cifar10_dit_edm [run=outputs/time] [KEY=VALUE ...]
#
# Nothing is shared between methods: each gets a copy of the first seed's run without scores. On a machine that does
# nothing else. The table is printed; CSV: <run>/tables/time.csv. Environment: see common.sh (the first of SEEDS is used).
. "$(dirname "$0")/common.sh"
seed=${seeds[0]}
source=$(run_of "$seed")
sampled "$seed"
for method in "${methods[@]}"; do
    run=$base/methods/${method//[^[:alnum:]_.-]/_}
    if [ ! -e "$run/run.json" ]; then
        mkdir -p "$run"
        cp -r "$source/data" "$source/train" "$source/sample" "$source/machine.json" "$source/run.json" "$run/"
    fi
    score_with "$method" "$run"
done
"$python" "$tables/time_table.py" "$base"
