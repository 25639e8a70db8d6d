#!/usr/bin/env bash
# The paper's ablation of the loss (CCA, DPO, unlearning) on LlamaGen-L, guidance-free.
#   bash scripts/reproduce_ablation.sh IMAGENET REFERENCE.npz            (GPUS=8 processes)
source "$(dirname "${BASH_SOURCE[0]}")/reproduce.sh" "$@" llamagen-l

codes=runs/reproduce/codes384
[ -f "$codes/header.json" ] || launch -m scripts.extract_codes --model llamagen-l --data "$data" --workers 8 --output "$codes"
for loss in cca dpo unlearning sft; do
    launch train_llamagen_cca.py --model llamagen-l --codes "$codes" --loss "$loss" --output "runs/reproduce/llamagen-l-$loss"
    row llamagen-l "$loss" --weights "runs/reproduce/llamagen-l-$loss/model.pt" --preset published
done
row llamagen-l base --preset published
table
