#!/usr/bin/env bash
# The README's result table: the quickstart over three seeds, and two control arms that must not learn (learning
# rate 0; rewards shuffled) over the same seeds, all from one start model. Prints one Markdown table on stdout,
# progress on stderr. About 10 minutes on 2 cores.
#
#   scripts/quickstart_table.sh [DIR]
#
#   DIR  where model and runs are made (default: a new directory under runs/). A DIR that holds finished runs shows
#        them again without training, also when the program has changed since: take a new one for new figures.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

case "${1:-}" in -h | --help) sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;; esac
[ $# -le 1 ] || { say "error: found $# arguments, expected at most one directory"; exit 2; }
out=${1:-runs/quickstart-table-$(date +%Y%m%d-%H%M%S)}

./scripts/bootstrap.sh
began=$SECONDS
mkdir -p "$out/arms"

# arm NAME ARGUMENTS...: three training runs; results and seconds into $out/arms/NAME-SEED.json.
arm() {
  local name=$1 seed start result
  shift
  for seed in 0 1 2; do
    say "==> $name, seed $seed"
    start=$SECONDS
    result=$("$TEMPER" quickstart --out "$out" --seed "$seed" --device cpu --json "$@")
    printf '{"seconds": %d, "result": %s}\n' $((SECONDS - start)) "$result" >"$out/arms/$name-$seed.json"
  done
}

start=$SECONDS
model=$("$TEMPER" quickstart --out "$out" --model-only)
model_s=$((SECONDS - start))
"$TEMPER" eval "$model" --config "$out/quickstart.yaml" --device cpu --json >"$out/arms/start.json"
arm trained
arm lr_0 --set optimizer.lr=0
arm shuffled --set reward.shuffled=true

"${PYTHON:-python3}" - "$out/arms" "$model_s" $((SECONDS - began)) <<'TABLE'
import json, pathlib, statistics, sys

folder, model_s, total_s = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
read = lambda name: json.loads((folder / f"{name}.json").read_text())
T_95 = 4.303  # Student's t, two-sided 95 %, 2 degrees of freedom

disagreeing, steps = 0, set()

def run(arm, seed):
    """One run: {condition: its before and after}, seconds."""
    global disagreeing
    found = read(f"{arm}-{seed}")
    disagreeing += found["result"]["disagreeing_steps"]
    steps.add(found["result"]["steps"])
    return {row["condition"]: row for row in found["result"]["conditions"]}, found["seconds"]

def percent(row, when):
    return 100 * row[when]["accuracy"]

def cell(row):
    low, high = (100 * bound for bound in row["after"]["ci95"])
    return f"{percent(row, 'before'):.1f} → {percent(row, 'after'):.1f} [{low:.1f}, {high:.1f}]"

def mean_row(label, runs):
    cells = []
    for condition in ("clean", "noisy"):
        before, after = (statistics.mean(percent(run[condition], when) for run, _ in runs) for when in ("before", "after"))
        cells.append(f"{before:.1f} → {after:.1f}")
    changes = [percent(run["noisy"], "after") - percent(run["noisy"], "before") for run, _ in runs]
    half = T_95 * statistics.stdev(changes) / len(changes) ** 0.5
    seconds = statistics.mean(seconds for _, seconds in runs)
    print(f"| {label} | {cells[0]} | {cells[1]} | {statistics.mean(changes):+.1f} ± {half:.1f} | {len(runs)} × {runs[0][0]['noisy']['n']} | {seconds:.0f} |")

print("| run | clean accuracy, % | noisy accuracy, % | noisy change, points | n | time, s |")
print("|---|---|---|---|---|---|")
def arm(label, mean_label, name):
    runs = [run(name, seed) for seed in range(3)]
    for seed, (row, seconds) in enumerate(runs):
        change = percent(row["noisy"], "after") - percent(row["noisy"], "before")
        print(f"| {label}seed {seed} | {cell(row['clean'])} | {cell(row['noisy'])} | {change:+.1f} | {row['noisy']['n']} | {seconds} |")
    mean_row(mean_label, runs)

arm("", "**mean of 3 seeds**", "trained")
arm("lr 0, ", "control, learning rate 0: mean", "lr_0")
arm("shuffled, ", "control, rewards shuffled: mean", "shuffled")

start = {row["name"]: 100 * row["well_formed_ratio"] for row in read("start")["conditions"]}
print(f"""
Before → after [95 % Wilson interval of after]; ± is the 95 % interval of the mean change over seeds (Student's t).
Steps of reinforcement learning: {", ".join(map(str, sorted(steps)))}. Well-formed answers at the start: {start["clean"]:.1f} % clean, {start["noisy"]:.1f} % noisy.
Steps whose measured noise disagreed with the plan: {disagreeing}. Making the start model took {model_s} s, everything {total_s} s.""")
TABLE
