#!/usr/bin/env bash
# Everything that wants a GPU, in two parts, each within minutes. Usage: bash benchmarks/gpu.sh pretrain|figures OUT [WHEELS]
#   pretrain  the second edition of the toybox in SECONDS_ (540) seconds: weights, report and sheet into OUT
#   figures   training_step.py and loading.py on the GPU, fp16 and 8-bit and xformers in short runs: results into OUT
# WHEELS is a folder of packages to install first, for machines that reach no package index.
set -u
part=$1 out=$2 wheels=${3:-}
cd "$(dirname "$0")/.." || exit 1
mkdir -p "$out"
if [ -n "$wheels" ]; then
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site "$wheels"/*.whl || exit 1
  export PYTHONPATH=/tmp/site:$PWD
fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore PYTHONUNBUFFERED=1
case $part in
pretrain)
  timeout $((${SECONDS_:-540} + 40)) python3 -m benchmarks.pretrain.train --out "$out" --seconds "${SECONDS_:-540}" ${OPTIONS:-} 2>&1 | grep -v -i warning | tee "$out/pretrain.log"
  ;;
figures)
  step="python3 benchmarks/training_step.py --output_dir $out"
  timeout 75 $step --parts sd15_gpu --methods spatial conv default attention joint lora_attn lora_conv oft reference --repeats 10 2>&1 | tail -25
  timeout 75 $step --parts sdxl_gpu --methods spatial conv lora_attn lora_conv --repeats 5 2>&1 | tail -12
  timeout 75 python3 benchmarks/loading.py --parts switch mixed --dtypes float16 --output "$out/loading_gpu.json" 2>&1 | tail -15
  run="timeout 40 python3 -m atomdiff.cli train --config configs/demo.yaml --instance_data_dir samples/subjects/mug --class_name mug --max_train_steps 20 --validation_prompt null"
  for options in "--mixed_precision fp16" "--mixed_precision bf16 --use_8bit_adam" "--enable_xformers_memory_efficient_attention"; do
    echo "train $options"
    $run $options --output_dir "/tmp/run$RANDOM" 2>&1 | tail -2 | cut -c1-300
  done
  ;;
*) echo "expected pretrain or figures, found $part"; exit 2 ;;
esac
