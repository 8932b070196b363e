#!/usr/bin/env bash
# What there is to do on a machine with a GPU, from the root of a checkout; no network is needed. Usage:
#   bash benchmarks/gpu/run.sh [stages]
#   build info tests bench step train use dry sanitize full loader: those up to sanitize if none is named; each has a time
#   limit of its own, none stops the others. `use` takes runs that `train` left.
# GPU_SECONDS: what the whole call may take (450). GPU_WHEELS: a folder of wheels to install first (packages that the
# machine lacks). For a rehearsal without a GPU: GPU_DEVICE=cpu, and GPU_PATIENCE=5 times the stages' limits.
# Logs and results go to $OUT, a table of all stages comes last.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
tmp=${TMPDIR:-/tmp} wheels=${GPU_WHEELS:-} out=${OUT:-$tmp/janus-out} site=${GPU_SITE:-$tmp/janus-site} work=${GPU_WORK:-$tmp/janus-work}
mkdir -p "$out" "$site" "$work"
export PYTHONPATH=$site PATH=$site/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 MPLBACKEND=Agg TQDM_DISABLE=1
export OMP_NUM_THREADS=2 JANUS_EXT_REQUIRE_NATIVE=1 HF_HUB_OFFLINE=1 TORCHINDUCTOR_CACHE_DIR=$work/inductor
device=${GPU_DEVICE:-cuda} patience=${GPU_PATIENCE:-1}
declare -A limit=([build]=180 [info]=40 [tests]=200 [sanitize]=170 [bench]=300 [step]=120 [train]=300 [full]=220 [loader]=120 [use]=150 [dry]=120)

need_gpu() { # the rehearsal goes on without one
  [[ $device == cpu ]] || python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo 'no GPU'; exit 77; }
}

stage_build() {
  local sources
  sources=$(find janus_ext csrc cmake CMakeLists.txt pyproject.toml -type f ! -name '*.pyc' | sort | xargs sha256sum | sha256sum)
  if [[ $(cat "$site/sources.sha256" 2> /dev/null) == "$sources" ]] &&
    python3 -c 'import tyro, janus_ext._native as n; n.require(); assert n.cuda_available(), n.cuda_reason()' 2> /dev/null; then
    echo 'already built'; return; fi
  [[ -z $wheels ]] || python3 -m pip install -q --no-index --no-deps --no-cache-dir --upgrade --target "$site" "$wheels"/*.whl || return
  local capability nvcc
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | head -n 1 | tr -d '. ')
  nvcc=$(command -v nvcc || ls /usr/local/cuda*/bin/nvcc /opt/*/bin/nvcc 2> /dev/null | head -n 1)
  echo "nvcc: ${nvcc:-none}; for sm_${capability:-90}; $(nproc) cores"
  CUDACXX=$nvcc python3 -m pip install --no-build-isolation --no-deps --no-index --no-cache-dir --upgrade --target "$site" \
    -Ccmake.define.JANUS_CUDA=ON -Ccmake.define.CMAKE_CUDA_ARCHITECTURES="${capability:-90}-real" \
    -Cbuild-dir="$work/build" -v . > "$out/build.log" 2>&1 && echo "$sources" > "$site/sources.sha256" && echo 'built' && return
  grep -iE 'error|fatal' "$out/build.log" | head -n 12
  return 1
}

stage_info() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit --format=csv,noheader
  python3 -m janus_ext.info
  python3 -m pip list 2> /dev/null | grep -iE '^(torch|numpy|timm|peft|transformers|safetensors|pytest|xdist|tyro|pybind|scikit|nvidia-cublas|triton) *'
  need_gpu && python3 -c 'import torch; from janus_ext import _native as n; assert n.cuda_available() or not torch.cuda.is_available(), n.cuda_reason()'
}

stage_tests() { # files in processes of their own: a kernel that traps ends the use of the GPU in one of them
  need_gpu
  python3 -m pytest python_tests -m "${GPU_MARK:-cuda}" -q -rfE --tb=short --timeout=$((120 * patience)) -p no:benchmark -p no:cacheprovider \
    -n "${GPU_JOBS:-6}" --dist loadfile --durations=15 --junitxml="$out/tests.xml" ${GPU_TESTS:-} > "$out/tests.log" 2>&1
  local status=$?
  grep -E '^(FAILED|ERROR)' "$out/tests.log" | cut -c 1-180 | head -n 40
  tail -n 1 "$out/tests.log"
  return $status
}

check() { # tool, its options, a colon, parts of smoke.py
  local tool=$1 options=() code; shift
  while [[ $1 != : ]]; do options+=("$1"); shift; done; shift
  timeout -k 5 $((150 * patience)) ${checker:+"$checker" --tool "$tool" "${options[@]}" --print-limit 20 --error-exitcode 9} \
    python3 "$here/smoke.py" "$device" "$@" > "$work/$tool.log" 2>&1
  code=$?
  { echo "== $tool"; cat "$work/$tool.log"; } >> "$out/sanitize.log"
  echo "$tool: status $code; $(grep -c '^ok' "$work/$tool.log") checks fine; $(tail -n 1 "$work/$tool.log" | cut -c 1-120)"
  return $code
}

stage_sanitize() { # the ops' own kernels; initcheck has to see all writers, hence all kernels
  need_gpu
  local checker status=0 pids=() pid
  checker=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2> /dev/null | head -n 1)
  [[ -n $checker || $device == cpu ]] || { echo 'no compute-sanitizer'; return 1; }
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # every tensor an allocation: what lies beyond is noticed
  check memcheck --kernel-name kns=janus : gram rectify margin lora & pids+=($!)
  check racecheck --kernel-name kns=janus : rectify margin & pids+=($!)
  check synccheck --kernel-name kns=janus : rectify margin & pids+=($!)
  check initcheck : rectify margin & pids+=($!)
  for pid in "${pids[@]}"; do wait "$pid" || status=1; done
  return $status
}

stage_bench() { # the registered cases, then what the GPU itself takes
  need_gpu
  [[ $device == cpu ]] || python3 "$here/alone.py" "$out/alone.jsonl" || return
  python3 benchmarks/run.py run kernels heads program --device "$device" --json "$out/gpu.json"
}
stage_step() {
  need_gpu
  set -o pipefail
  python3 "$here/step.py" "$device" "$out/step.txt" | grep -vE '^-+ |aten::|autograd::' | cut -c 1-150 | sed -n 1,48p
}

train() { # name, flags: one run on few classes; its last line of accuracy, or of the error
  local name=$1 code; shift
  timeout --foreground -k 5 $((150 * patience)) python3 -m janus_ext.train --device "$device" --output "$work/runs/$name" --no-plots $small "$@" > "$work/runs/$name.log" 2>&1
  code=$?
  { echo "== $name: $*"; tail -n 25 "$work/runs/$name.log"; } >> "$out/train.log"
  printf '%-22s status %3d  %s\n' "$name" "$code" "$(grep -E '^janus_ext.train:|Error|task [0-9]+/' "$work/runs/$name.log" | tail -n 1 | cut -c 1-110)"
  return $code
}
same() { python3 "$here/same.py" "$work/runs/$1/results.json" "$work/runs/$2/results.json"; }

stage_train() {
  need_gpu
  rm -rf "$work/runs"; mkdir -p "$work/runs"
  small=${GPU_SMALL:---tasks 4 --epochs 3} # all classes and images, a quarter of the epochs
  local method pids=() status=0 pid
  for method in janus lora lora-gpm inflora lora-drs bilora joint; do
    if [[ $method == joint ]]; then small=${small/--tasks [0-9]/}; fi
    train "$method" --method "$method" & pids+=($!)
  done
  small=${GPU_SMALL:---tasks 4 --epochs 3}
  for pid in "${pids[@]}"; do wait "$pid" || status=1; done; pids=()
  train off --amp off & pids+=($!)
  train fp16 --amp fp16 & pids+=($!)
  train compile --compile & pids+=($!)
  train accumulate --accumulate 3 & pids+=($!)
  train isvd --estimator isvd --estimator-rank 64 & pids+=($!)
  train tangent --rectify tangent & pids+=($!)
  train gpm-exact --method lora-gpm --rectify exact --clip-norm 1 & pids+=($!)
  train again & pids+=($!)
  { train cut & pid=$!
    for _ in {1..900}; do [[ -e $work/runs/cut/results.json || -e $work/runs/cut/checkpoints/method-1.safetensors ]] && break; sleep 0.2; done
    python3 "$here/same.py" --kill "$work/runs/cut" && { wait "$pid"; train cut --resume; }; } & pids+=($!)
  { train within & pid=$!
    for _ in {1..4500}; do
      [[ -e $work/runs/within/results.json ]] && break
      [[ -e $work/runs/within/checkpoints/method-1.safetensors && -e $work/runs/within/checkpoints/within.safetensors ]] && break
      sleep 0.02
    done
    python3 "$here/same.py" --kill "$work/runs/within" && { wait "$pid"; train within --resume; }; } & pids+=($!)
  for pid in "${pids[@]}"; do wait "$pid" || status=1; done
  printf 'twice the same bits: '; same janus again || status=1
  printf 'cut off and resumed, the same bits: '; same janus cut || status=1
  printf 'cut off within a task and resumed, the same bits: '; same janus within || status=1
  return $status
}

call() { # name, module, its arguments: its last line
  local name=$1 code; shift
  timeout --foreground -k 5 $((100 * patience)) python3 -m "$@" > "$work/$name.log" 2>&1
  code=$?
  { echo "== $name: $*"; tail -n 12 "$work/$name.log"; } >> "$out/use.log"
  printf '%-22s status %3d  %s\n' "$name" "$code" "$(tail -n 1 "$work/$name.log" | cut -c 1-100)"
  return $code
}

stage_use() { # what comes after training, with a run of the GPU; and processes of which there is no GPU for each
  need_gpu
  local pids=() status=0 pid run=$work/runs/janus format
  rm -rf "$work/use"; mkdir -p "$work/use"
  for where in $(printf '%s\n' "$device" cpu | sort -u); do
    call "evaluate-$where" janus_ext.evaluate "$run" --device "$where" --output "$work/use/$where" & pids+=($!)
  done
  call evaluate-ridge janus_ext.evaluate "$run" --head ridge --device "$device" --output "$work/use/ridge" & pids+=($!)
  for format in timm onnx pt2; do
    call "export-$format" janus_ext.export "$run" --format "$format" --output "$work/use/$format" & pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || status=1; done
  python3 "$here/exported.py" "$work/use" "$device" || status=1
  small=${GPU_SMALL:---tasks 4 --epochs 3}
  echo 'more processes than GPUs: an error is right'
  CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0} call together torch.distributed.run --nproc-per-node 2 -m janus_ext.train --device "$device" --output "$work/use/together" --no-plots $small
  [[ $device == cpu ]] || grep -q 'each process needs a GPU of its own, and 2 have 1' "$work/together.log" || status=1
  call together-cpu torch.distributed.run --nproc-per-node 2 -m janus_ext.train --device cpu --output "$work/use/two" --no-plots $small || status=1
  return $status
}

stage_dry() { need_gpu && python3 benchmarks/full_size.py dry --device "$device" --json "$out/dry.json"; }

stage_full() { # the README's first run in two precisions, with what it gave on a CPU beside it
  need_gpu
  local status=0 precision
  small=${GPU_SMALL:-}
  rm -rf "$work/runs"/full-*; mkdir -p "$work/runs"
  for precision in bf16 off; do
    train "full-$precision" --amp "$precision" && cp "$work/runs/full-$precision/results.json" "$out/full-$precision.json" &&
      python3 "$here/same.py" "$out/full-$precision.json" benchmarks/results/emoji-janus-0/results.json --near || status=1
  done
  return $status
}

stage_loader() { need_gpu && python3 "$here/loader.py" "$device" "$work/photos"; }

if [[ $1 == --stage ]]; then "stage_$2"; exit; fi

all_stages() { # a stage writes to a file, not to a pipe: what it may leave running cannot hold the next one up
  local deadline=$((SECONDS + ${GPU_SECONDS:-450})) failed=0 stage left most begun said table=''
  for stage in "$@"; do
    [[ -n ${limit[$stage]} ]] || { echo "$stage: no such stage"; continue; }
    left=$((deadline - SECONDS)) begun=$SECONDS most=$((limit[$stage] * patience)) most=$((left < most ? left : most))
    if ((most < 15)); then failed=1 table+=$(printf '%-9s no time left' "$stage")$'\n'; continue; fi
    printf '\n=== %s, %d s at most\n' "$stage" "$most"
    timeout -k 10 "$most" bash "${BASH_SOURCE[0]}" --stage "$stage" > "$work/$stage.txt" 2>&1
    case $? in 0) said=ok ;; 77) said='no GPU' ;; 124 | 137) said='TIME OUT' ;; *) said=FAILED ;; esac
    [[ $said == ok ]] || failed=1
    cat "$work/$stage.txt"
    table+=$(printf '%-9s %-9s %4d s  %s' "$stage" "$said" $((SECONDS - begun)) "$(tail -n 1 "$work/$stage.txt" | cut -c 1-110)")$'\n'
  done
  printf '\n=== %d s; %s\n%s' "$SECONDS" "$(git rev-parse --short HEAD 2> /dev/null)" "$table"
  return $failed
}
set -o pipefail
all_stages ${*:-build info tests bench step train sanitize} 2>&1 | tee "$out/console.txt"
