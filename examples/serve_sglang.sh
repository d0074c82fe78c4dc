#!/usr/bin/env bash
# Serve a model with SGLang and this attention, on a GPU. SGLang must be installed, and this package beside it.
#
#   examples/serve_sglang.sh checkpoints/reference      # or any other model; further arguments go to SGLang
#   examples/serve_sglang.sh checkpoints/reference --device cpu --disable-cuda-graph --disable-overlap-schedule
#
# Then, in another terminal:
#
#   curl http://127.0.0.1:30000/v1/completions -H 'Content-Type: application/json' -d '
#     {"model": "served", "prompt": "Return the", "max_tokens": 40, "temperature": 0}'
set -euo pipefail
model=${1:?"usage: $0 MODEL [SGLang's arguments]"}
shift

exec python -m sglang.launch_server --model-path "$model" --served-model-name served \
    --host 127.0.0.1 --port "${PORT:-30000}" --model-impl transformers --trust-remote-code \
    --attention-backend my_triton "$@"
