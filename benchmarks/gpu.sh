#!/usr/bin/env bash
# Everything that wants a GPU, in parts, each within minutes. Usage: bash benchmarks/gpu.sh PART OUT [WHEELS]
#   pretrain  the toybox's base and judge in SECONDS_ (540) seconds: weights, report and sheet into OUT
#   begin     the same in the background, in the folder STATE (/tmp/pretrain); returns when the UNet's training begins, or
#             after WAIT (215) seconds: log into OUT
#   finish    ends it after SECONDS_ more seconds, and waits for that: the parts trained, report, sheet and log into OUT
#   compare   benchmarks.compare_methods in SECONDS_ (480) seconds, PROCESSES (one a core) runs at a time, with OPTIONS; then
#             benchmarks.sheets in SHEETS (0) seconds. At most seven files into OUT: what is done, in compare.tar.xz.*, and
#             the log. Those files in the folder FROM (out/compare), from an earlier call, are gone on from.
#   figures   training_step.py and loading.py on the GPU, fp16 and 8-bit and xformers in short runs: results into OUT
# Weights come in files of at most 15 MiB, and `finish` writes seven files at most: more are not copied from some machines.
# WHEELS is a folder of packages to install first, for machines that reach no package index.
set -u
part=$1 out=$2 wheels=${3:-} state=${STATE:-/tmp/pretrain}
cd "$(dirname "$0")/.." || exit 1
mkdir -p "$out"
if [ -n "$wheels" ]; then
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site "$wheels"/*.whl || exit 1
  export PYTHONPATH=/tmp/site:$PWD
fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore PYTHONUNBUFFERED=1
case $part in
pretrain)
  timeout $((${SECONDS_:-540} + 40)) python3 -m benchmarks.pretrain.train --out "$out" --seconds "${SECONDS_:-540}" ${OPTIONS:-} 2>&1 | grep --line-buffered -v -i warning | tee "$out/pretrain.log"
  ;;
begin)
  mkdir -p "$state"
  echo $(($(date +%s) + ${SECONDS_:-740})) >"$state/deadline"
  # shellcheck disable=SC2086
  setsid nohup python3 -m benchmarks.pretrain.train --out "$state" --seconds "${SECONDS_:-740}" ${OPTIONS:-} \
    >"$state/log" 2>&1 </dev/null &
  echo $! >"$state/pid"
  for _ in $(seq "${WAIT:-215}"); do
    sleep 1
    kill -0 "$(cat "$state/pid")" 2>/dev/null || break
    grep -q "^denoiser: .* step " "$state/log" && break
  done
  grep -v -i warn "$state/log" | cut -c1-600 | tail -n 70
  cp "$state/log" "$out"
  ;;
finish)
  echo $(($(date +%s) + ${SECONDS_:-60})) >"$state/deadline"
  for _ in $(seq $((${SECONDS_:-60} + 15))); do
    sleep 1
    kill -0 "$(cat "$state/pid")" 2>/dev/null || break
    [ -f "$state/sheet.png" ] && break
  done
  grep -v -i warn "$state/log" | cut -c1-600 | tail -n 70
  cp "$state"/log "$state"/report.json "$state"/weights-*.safetensors "$state"/sheet.png "$out"
  ;;
compare)
  # Packed: the result files, and how each run ended, so that it is not run again; and if three files hold them, the small
  # concepts of the evaluation subjects, seed 0. That comes before the sheets, which may train what was not packed.
  work=out/compare
  mkdir -p $work/{runs,methods}
  compgen -G "${FROM:-out/compare}/compare.tar.xz.*" >/dev/null && cat "${FROM:-out/compare}"/compare.tar.xz.* | tar xJ
  folders=(--work_dir "$work/runs" --output_dir "$work/methods")
  # shellcheck disable=SC2086
  timeout -k 30 "${SECONDS_:-480}" python3 -m benchmarks.compare_methods --processes "${PROCESSES:-$(nproc)}" \
    "${folders[@]}" ${OPTIONS:-} 2>&1 | tee "$out/compare.log" | grep -E '^[0-9]+/[0-9]+ .*: ' | cut -c1-200
  results() {
    find "$work/methods" -name '*.json'
    find "$work/runs" -name result.json -printf '%h/trial.json\n%h/adapter.json\n%p\n'
  }
  concepts() {
    find "$work/runs" -path '*/subjects-*-seed0/trained.json' -printf '%h\n' | while read -r run; do
      [ -f "$run/result.json" ] && find "$run/run" -name '*.atoms.safetensors' -size -128k -printf "%p\n$run/trained.json\n"
    done
  }
  pack() {
    rm -f "$out"/compare.tar.xz.*
    tar cJ -T - | split -b 15M -d - "$out/compare.tar.xz."
  }
  { results; concepts; } | pack
  parts=("$out"/compare.tar.xz.*)
  [ ${#parts[@]} -le 3 ] || results | pack
  if [ "${SHEETS:-0}" -gt 0 ]; then
    timeout -k 30 "$SHEETS" python3 -m benchmarks.sheets --processes "${PROCESSES:-$(nproc)}" --work_dir "$work/runs" \
      --results "$work/methods" --images "$out" --output "$out/sheets.json" >>"$out/compare.log" 2>&1
  fi
  ;;
figures)
  # Every piece has its own limit and writes what it has, so that a stop costs one piece. 200 s were too few for all nine
  # methods of a part: a few methods each.
  piece() { echo "== $*"; timeout "${LIMIT:-100}" "$@" >"$out/piece.log" 2>&1; echo "ended with $?"; grep -v -i warning "$out/piece.log" | cut -c1-200 | tail -n 14; }
  for methods in "spatial lora_attn" "conv lora_attn"; do
    # shellcheck disable=SC2086
    piece python3 -m benchmarks.training_step --output_dir "$out/${methods%% *}" --parts sd15_gpu --methods $methods --repeats 10
  done
  for options in "--mixed_precision fp16" "--mixed_precision bf16 --use_8bit_adam" "--enable_xformers_memory_efficient_attention"; do
    # shellcheck disable=SC2086
    LIMIT=50 piece python3 -m atomdiff train --config configs/demo.yaml --instance_data_dir samples/subjects/mug \
      --class_name mug --max_train_steps 20 --validation_prompt null --output_dir "$(mktemp -d)" $options
  done
  piece python3 -m benchmarks.training_step --output_dir "$out" --parts sdxl_gpu --methods spatial lora_attn --repeats 5
  piece python3 -m benchmarks.loading --parts switch mixed --dtypes float16 --output "$out/loading_gpu.json"
  ;;
*) echo "expected pretrain, begin, finish, compare or figures, found $part"; exit 2 ;;
esac
