#!/bin/bash
# On each of two machines, with its number (0 or 1) and the address of the first:
# examples/flux/launch/two_nodes.sh 1 10.0.0.1 kontext-nft --data.chains train.jsonl ...
# Uses torchrun in place of accelerate (two_nodes.yaml). Both machines must share output.folder; GPUS
# is the number of devices per machine, 8 by default.
set -euo pipefail

if [ $# -lt 3 ]; then
    echo "error: expected the machine's number, the address of the first, and a preset" >&2
    exit 2
fi
node="$1" address="$2"
shift 2
exec torchrun --nnodes=2 --nproc-per-node="${GPUS:-8}" --node-rank="$node" \
    --master-addr="$address" --master-port=29500 examples/train_flux.py "$@"
