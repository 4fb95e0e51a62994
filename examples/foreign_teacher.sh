#!/usr/bin/env bash
# A network that is not fastdmd's, from its weights to a generator of one step and its samples, by commands alone.
# `bash examples/foreign_teacher.sh [FOLDER [UPDATES [ITERATIONS]]]`, in the folder of the sources.
set -euo pipefail
out=${1:-runs/foreign} updates=${2:-500} iterations=${3:-400} code=examples.foreign_unet:ForeignUNet
mkdir -p "$out"

# Your own training, long ago, has left the network's state, under the network's own names.
python - "$out/weights.safetensors" "$updates" <<'PYTHON'
import sys
from safetensors.torch import save_file
from examples.foreign_unet import trained
save_file(trained(int(sys.argv[2])).state_dict(), sys.argv[1])
PYTHON

# The class, its weights, and how it is called: an image of (x, sigma, one-hot labels).
python -m fastdmd train --teacher "$code" --teacher-weights "$out/weights.safetensors" --parameterization x0 \
    --teacher-labels one_hot --out "$out/run" --iterations "$iterations" --batch-size 16 --num-samples 0

# A file never makes fastdmd import code: whoever reads it names the code again.
python -m fastdmd sample "$out/run/generator.safetensors" --network "$code" --num 20 --labels 3,5 --out "$out/samples.npz"
