#!/usr/bin/env bash
# The main table: methods x metrics, over several seeds; linear datamodeling score and counterfactual retraining.
#
#   scripts/tables/main.sh experiment=cifar10_dit_edm [run=outputs/main] [KEY=VALUE ...]
#
# What is finished is not computed again: after an interruption, call it again. Several calls at once share the retraining
# (start them a moment apart). Tables: <run>/tables/{lds,counterfactual}.md, over all seeds, and lds-seed-S.md, with CSV
# and LaTeX beside them; those over all seeds are printed as well. Environment: see common.sh, and
#
#   LDS             overrides of evaluation=lds, for example "evaluation.num_subsets=32" (LDS=skip leaves it out)
#   COUNTERFACTUAL  overrides of evaluation=counterfactual (COUNTERFACTUAL=skip leaves it out)
. "$(dirname "$0")/common.sh"
read -ra lds <<< "${LDS:-}"
read -ra counterfactual <<< "${COUNTERFACTUAL:-}"

for seed in "${seeds[@]}"; do scored "$seed"; done
mkdir -p "$base/tables"
for seed in "${seeds[@]}"; do
    run=$(run_of "$seed")
    if [ "${LDS:-}" != skip ]; then
        say "seed $seed: linear datamodeling score"
        evaluate run="$run" evaluation=lds "${lds[@]}"
        for kind in md csv tex; do cp "$run/evaluate/lds/table.$kind" "$base/tables/lds-seed-$seed.$kind"; done
    fi
    if [ "${COUNTERFACTUAL:-}" != skip ]; then
        say "seed $seed: counterfactual"
        evaluate run="$run" evaluation=counterfactual "${counterfactual[@]}"
    fi
done
pooled() {
    local evaluation=$1 run
    shift
    run=$(run_of "${seeds[0]}")
    evaluate run="$run" evaluation="$evaluation" "$@" evaluation.runs="$(others)"
    for kind in md csv tex; do cp "$run/evaluate/$evaluation/table.$kind" "$base/tables/$evaluation.$kind"; done
    cat "$base/tables/$evaluation.md"
}
[ "${LDS:-}" = skip ] || pooled lds "${lds[@]}"
[ "${COUNTERFACTUAL:-}" = skip ] || pooled counterfactual "${counterfactual[@]}"
