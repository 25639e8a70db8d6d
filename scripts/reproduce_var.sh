#!/usr/bin/env bash
# VAR rows of the paper's tables: base without guidance, base with guidance, published CCA, and CCA trained here.
#   bash scripts/reproduce_var.sh IMAGENET REFERENCE.npz [MODEL …]      (default: all; GPUS=8 processes)
source "$(dirname "${BASH_SOURCE[0]}")/reproduce.sh" "$@"

for model in "${models[@]:-}"; do
    train train_var_cca.py "$model" --data "$data" --workers 8
    rows "$model" "runs/reproduce/$model/model.pth"
done
table
