# Sourced by the reproduce_*.sh: arguments, and one function per kind of run. Every step that is done already is skipped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -ge 2 ] || { echo "error: usage: bash scripts/reproduce_*.sh IMAGENET_FOLDER REFERENCE.npz [MODEL …]" >&2; exit 2; }
data=$1 reference=$2
shift 2
case "$(basename "$0")" in *_var*) models=(var-d16 var-d20 var-d24 var-d30) ;; *) models=(llamagen-b llamagen-l llamagen-xl llamagen-xxl llamagen-3b) ;; esac
[ $# -eq 0 ] || models=("$@")
results=()

launch() { torchrun --nproc_per_node "${GPUS:-8}" "$@"; }

# train SCRIPT MODEL [OPTION …]: the published recipe; resumes
train() { launch "$1" --model "$2" --output "runs/reproduce/$2" "${@:3}"; }

# row MODEL NAME [OPTION of sample.py …]: 50,000 samples and their evaluation
row() {
    local name="runs/reproduce/$1-$2"
    [ -f "$name.npz" ] || launch sample.py --model "$1" --output "$name.npz" "${@:3}"
    [ -f "$name.eval.json" ] || launch eval_fid.py --samples "$name.npz" --reference "$reference" --output "$name.eval.json"
    results+=("$name.eval.json")
}

# rows MODEL TRAINED: the four rows of a model
rows() {
    row "$1" base --weights base --preset published
    row "$1" base-guided --weights base --preset published-cfg
    row "$1" cca-published --weights cca --preset published
    row "$1" cca-trained --weights "$2" --preset published
}

table() { python eval_fid.py --compare "${results[@]}"; }
