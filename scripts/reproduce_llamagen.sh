#!/usr/bin/env bash
# LlamaGen rows of the paper's tables: base without guidance, base with guidance, published CCA, and CCA trained here.
#   bash scripts/reproduce_llamagen.sh IMAGENET REFERENCE.npz [MODEL …]  (default: all; GPUS=8 processes)
source "$(dirname "${BASH_SOURCE[0]}")/reproduce.sh" "$@"

codes=runs/reproduce/codes384
[ -f "$codes/header.json" ] || launch -m scripts.extract_codes --model llamagen-b --data "$data" --workers 8 --output "$codes"
for model in "${models[@]:-}"; do
    train train_llamagen_cca.py "$model" --codes "$codes"
    rows "$model" "runs/reproduce/$model/model.pt"
done
table
