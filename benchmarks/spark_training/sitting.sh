#!/bin/bash
# One sitting's first part, on the GPU machine: VAE and recogniser side by side, then the flow.
cd "$(dirname "$0")/../.."
python -m pip install -q --no-deps .wheels/*.whl 2>&1 | tail -1
export PYTHONPATH=$PWD/src:$PWD/benchmarks HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
W=/tmp/w; mkdir -p $W
timeout 300 python -m spark_training.parts2 recogniser --out $W --minutes 3.4 > $W/rec.log 2>&1 &
timeout 300 python -m spark_training.parts2 vae --out $W --minutes 3.3 > $W/vae.log 2>&1
wait
tail -2 $W/rec.log; tail -2 $W/vae.log
timeout 1200 python -m spark_training.run2 --vae $W/vae.safetensors --out $W --until ${1:-1040} --pool 200000 > $W/flow.log 2>&1
