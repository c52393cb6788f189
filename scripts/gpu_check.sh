#!/usr/bin/env bash
# Everything that shows whether temper works on this machine's GPU, and how fast: doctor, selftest, compute-sanitizer,
# kernel benchmarks beside torch's own, a short training run, and at last whole steps of E5c at the shape of Qwen2.5-1.5B
# (random weights) beside transformers and plain torch. One line a step; goes on after a failure, and ends with exit
# code 1 if there was one.
#
#   scripts/gpu_check.sh [--quick] [DIR]
#
#   --quick  small matrices and models, no benchmarks of kernels
#   DIR      where each step's output goes (default: a new directory under runs/)
#   TEMPER   the binary (default target/release/temper); PYTHON one with torch (default .venv/bin/python or python3)
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

quick=""
case "${1:-}" in
  -h | --help) sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
  --quick) quick=--quick; shift ;;
esac
[ $# -le 1 ] || { say "error: found $# arguments, expected at most one directory"; exit 2; }
out=${1:-runs/gpu-check-$(date +%Y%m%d-%H%M%S)}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
[ -x "$TEMPER" ] || die "$TEMPER was not found" "run scripts/bootstrap.sh, or set TEMPER"
mkdir -p "$out"
failed=0

step() { # step NAME COMMAND...: stdout to DIR/NAME.out, stderr to DIR/NAME.err
  local name=$1
  shift
  phase "$name" run_to "$out/$name" "$@" || {
    failed=$((failed + 1))
    tail -n 5 "$out/$name.err" >&2
  }
}
run_to() { local to=$1; shift; "$@" >"$to.out" 2>"$to.err"; }

step doctor "$TEMPER" doctor --json
# shellcheck disable=SC2086 # one word or none
step selftest "$TEMPER" selftest --device cuda $quick
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 "$TEMPER" selftest --device cuda --quick
  done
else
  say "    compute-sanitizer: not here, left out"
fi
if [ -z "$quick" ]; then
  step bench_kernels "$TEMPER" bench kernels --device cuda --json
  step bench_torch "$python" scripts/bench_torch.py --beside "$out/bench_kernels.out"
fi
step train "$TEMPER" train configs/debug.yaml --device cuda --out "$out/runs"

# The same lengths for all three; what came before has the time that it needs, these end after a few minutes each.
config=configs/e5c.yaml tiny="" limit=(timeout 300)
if [ -n "$quick" ]; then config=configs/debug.yaml tiny=--tiny; fi
# shellcheck disable=SC2086 # one word or none
step lengths "$python" scripts/bench_peers.py $tiny --write-lengths "$out/lengths.txt"
step bench_train "${limit[@]}" "$TEMPER" bench train "$config" --device cuda --set model.path=null \
  --lengths "$out/lengths.txt" --steps 1 --profile "$out/bench_train.trace.json" --json
# Its logprob_gap_abs stands beside bench_peers' logprob_gap.
step bench_clean "${limit[@]}" "$TEMPER" bench train "$config" --device cuda --set model.path=null \
  --set noisy_ops.enabled=false --set noise_injection.enabled=false --lengths "$out/lengths.txt" --steps 1 --warmup 0 --json
step bench_rollout "${limit[@]}" "$TEMPER" bench rollout "$config" --device cuda --set model.path=null \
  --lengths "$out/lengths.txt" --steps 2 --warmup 0 --json
# Other models, or nothing at all, cannot be put beside the peers.
beside=()
if [ -z "$quick" ] && [ -s "$out/bench_train.out" ]; then beside=(--beside "$out/bench_train.out"); fi
# shellcheck disable=SC2086 # one word or none
step bench_peers "${limit[@]}" "$python" scripts/bench_peers.py $tiny --device cuda --lengths "$out/lengths.txt" \
  --steps 1 "${beside[@]}"
say "results: $out"
[ "$failed" -eq 0 ] || die "$failed steps failed"
