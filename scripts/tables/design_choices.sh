#!/usr/bin/env bash
# The design study of MUCS: every choice of its unlearning and scoring in turn, four queries, one table.
#
#   scripts/tables/design_choices.sh experiment=digits [run=outputs/design] [KEY=VALUE ...]
#
# The arguments go to every command: any experiment, another run=, device=cpu, queries.index=0:10. What is finished is
# not computed again: after an interruption, call it again. The table is Markdown on stdout, with all digits in
# <run>/tables/design_choices.csv; everything else is on stderr.
#
#   PYTHON       the interpreter (default .venv/bin/python of the checkout, else python3)
#   CHOICES      only the choices whose first key contains this, for example CHOICES=noise_bank (default: all)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-$here/../../.venv/bin/python}
[ -x "$(command -v "$python")" ] || python=python3
given=(queries.index=0:4 "$@")
left_out=()

mucs() { "$python" -m mucs_cli "$@" > /dev/null; }

# One sweep: a variant for every value. A value that this model cannot take, or with which it diverges, is said and left
# out; so is the rest of its sweep. Anything but a user's error ends the study.
choice() {
    case $1 in *"${CHOICES:-}"*) ;; *) return 0 ;; esac
    local status=0
    echo "design: $*" >&2
    mucs run -m "${given[@]}" 'stages=[unlearn,score]' "$@" || status=$?
    case $status in
        0) ;;
        2) left_out+=("$*") ;;
        *) exit "$status" ;;
    esac
}

times() { "$python" "$here/design_table.py" --learning-rate-times "$1" "${given[@]}"; }

mucs run "${given[@]}" 'stages=[train,sample]'
# The default keeps its losses: variants of the reducer, and those that spell out what `auto` stands for and so come to
# the same unlearned models, need no forward pass.
mucs run "${given[@]}" 'stages=[unlearn,score]' score.keep_losses=true

# unlearning: augmentation, noise, levels, weights
choice unlearning.horizontal_flip=true
choice unlearning.augmentation=0.12
choice unlearning.same_noise=true
choice unlearning.schedule=grid
choice unlearning.forget_weight=0.05,0.1,0.5,1
choice unlearning.similarity_weight=2,-2

# unlearning: the bound and when to stop
choice unlearning.null_loss=closed_form
choice unlearning.null_loss=monte_carlo,0.5
choice unlearning.null_loss=none unlearning.num_steps=10
choice unlearning.tolerance=0.5,0.8,0.98
choice unlearning.max_steps=5
choice unlearning.num_steps=1,3,10,30

# unlearning: learning rate and parameters
choice "unlearning.learning_rate=$(times 0.3),$(times 3)"
choice unlearning.trainable=mlp
choice unlearning.trainable=all_but_bias
choice unlearning.trainable=attention
choice unlearning.trainable=all
choice unlearning.trainable=last_blocks unlearning.num_blocks=1

# scoring
choice noise_bank.num_draws=10,20,50,200
choice noise_bank.grid=exact,full,even
choice noise_bank.consistent=false
choice method.reducer=ratio_of_means,difference,absolute_difference
choice method.epsilon=0,1e-5,0.1

for what in "${left_out[@]}"; do echo "design: left out, see above: $what" >&2; done
"$python" "$here/design_table.py" "${given[@]}"
