#!/usr/bin/env bash
# Everything that only a GPU can show, in one command: the CUDA tests, then a 7B shape with random weights under a 24 GB
# cap, qlora against TRL + PEFT + bitsandbytes in turn: tokens/s, peak memory.
#
#   ./scripts/gpu_check.sh [FOLDER]      FOLDER takes 15 GB of random weights (default: runs/random-7b)
set -euo pipefail
. "$(dirname "$0")/setup.sh"
folder=${1:-runs/random-7b}

python -m pytest -m gpu

tokenizer=$(python scripts/quickstart_model.py)
[ -d "$folder" ] || python scripts/random_model.py --shape mistral-7b --tokenizer "$tokenizer" --out "$folder"
python scripts/quickstart_data.py runs/quickstart-data
common="--model $folder --data runs/quickstart-data/train.jsonl --steps 12 --rounds 3 --cap-gib 23.5 --checkpointing"
python scripts/benchmark_train.py $common --batch 8
python scripts/benchmark_train.py $common --batch 16 --packing 4096 --plain-packing 4096
full="--model $folder --steps 6 --rounds 3 --batch 1 --cap-gib 23.5 --checkpointing"
python scripts/benchmark_train.py $full --full-rows 2048
python scripts/benchmark_train.py $full --full-rows 4096
for tokens in 61440 79872 131072; do # planned to fit with layer inputs offloaded to CPU memory
    python scripts/benchmark_train.py --model "$folder" --steps 3 --rounds 1 --batch 1 --cap-gib 23.5 --full-rows $tokens --only qlora
done
python scripts/benchmark_kernels.py --model "$folder" --tokens 2048
python scripts/benchmark_export.py --shape mistral-7b --tokenizer "$tokenizer" --folder "$(dirname "$folder")"
