# What the table scripts share; sourced. Arguments after the script's name must choose an experiment, may name run=, the
# folder below which everything goes (default outputs/<script>), and may set keys. Runs are made with all of them; scoring
# starts from the run and gets the keys of a section (unlearning.max_steps=) and device=; evaluations only device=.
#
#   PYTHON   the interpreter (default .venv/bin/python of the checkout, else python3)
#   SEEDS    a base model and its queries each (default "1 2 3 4")
#   METHODS  which methods, by name (default: those that need no weights from elsewhere); with settings after a colon:
#            METHODS="mucs mucs:noise_bank.grid=even,unlearning.forget_weight=0.5 pixel:method.similarity=euclidean"
set -euo pipefail
tables=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-$tables/../../.venv/bin/python}
[ -x "$(command -v "$python")" ] || python=python3
read -ra seeds <<< "${SEEDS:-1 2 3 4}"
read -ra methods <<< "${METHODS:-mucs forward_inf abu trak dtrak das tracin pixel condition random}"

base=outputs/$(basename "$0" .sh)
made_with=() for_scores=() device=()
for argument in "$@"; do
    case $argument in
        run=*) base=${argument#run=} ;;
        *) made_with+=("$argument") ;;
    esac
    case $argument in
        device=*) device+=("$argument"); for_scores+=("$argument") ;;
        *.*=*) for_scores+=("$argument") ;;
    esac
done
case " ${made_with[*]-} " in
    *" experiment="*) ;;
    *) echo "$(basename "$0"): experiment= is missing; expected one of conf/experiment, for example experiment=digits" >&2; exit 2 ;;
esac

say() { echo "$(basename "$0" .sh): $*" >&2; }
run_of() { echo "$base/seed-$1"; }
mucs() { "$python" -m mucs_cli "$@" > /dev/null; }
evaluate() { mucs evaluate "${device[@]}" "$@"; }

# Trains the base model of a seed and samples its queries.
sampled() { mucs run "${made_with[@]}" run="$(run_of "$1")" seed="$1" 'stages=[train,sample]'; }

# Scores a run with one method, given with its settings. One that this model or data cannot take is said and left out.
score_with() {
    local method=${1%%:*} run=$2 status=0 settings=()
    [ "$1" = "$method" ] || IFS=, read -ra settings <<< "${1#*:}"
    say "$run: $1"
    case $method in
        mucs|forward_inf|abu) mucs run "${for_scores[@]}" run="$run" method="$method" "${settings[@]}" 'stages=[unlearn,score]' || status=$? ;;
        *) mucs score "${for_scores[@]}" run="$run" method="$method" "${settings[@]}" || status=$? ;;
    esac
    [ "$status" = 0 ] || [ "$status" = 2 ] || exit "$status"
    [ "$status" = 0 ] || say "$run: left out $1, see above"
}

# Makes the run of one seed and scores it with every method.
scored() {
    local method
    sampled "$1"
    for method in "${methods[@]}"; do score_with "$method" "$(run_of "$1")"; done
}

# The other seeds' runs as a list for evaluation.runs.
others() { local list="" seed; for seed in "${seeds[@]:1}"; do list+="${list:+,}$(run_of "$seed")"; done; echo "[$list]"; }
