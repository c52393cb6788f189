#!/usr/bin/env python3
"""Sends temper's run directories to Weights & Biases: metrics.jsonl under its own names, timing.jsonl under timing/.

    scripts/wandb_sync.py [--project NAME] [--offline] RUN...

A run's name is that of its directory, its group is the arm (name and configuration hash), its configuration the resolved
one. Every call sends the steps that were not sent before (RUN/wandb_sync.json remembers the last), so it can be repeated
while a run grows; the newest step of a run that is being written waits, since its validation may not be there yet.
Needs `pip install wandb`, and `wandb login` unless --offline.
"""

import argparse
import fcntl
import json
import re
import sys
from pathlib import Path

STATE = "wandb_sync.json"


def fail(text, code):
    print(f"error: {text}", file=sys.stderr)
    sys.exit(code)


def rows(path):
    """Whole lines; the last one may be half written."""
    if not path.exists():
        return
    for number, line in enumerate(path.read_text().splitlines(keepends=True), 1):
        if line.endswith("\n"):
            try:
                yield json.loads(line)
            except ValueError as e:
                fail(f"{path} line {number}: {e}", 2)


def numbers(row, prefix=""):
    number = lambda value: isinstance(value, (int, float)) and not isinstance(value, bool)
    return {prefix + key: value for key, value in row.items() if key != "step" and number(value)}


def being_written(run):
    """temper holds a lock as long as it writes a run."""
    lock = run / ".lock"
    if not lock.exists():
        return False
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def values_by_step(run):
    """step -> all its values, training, validation and timing together."""
    # Asked first: a run that ends in between is then sent without its last step, never with half of it.
    growing = being_written(run)
    steps = {}
    for row in rows(run / "metrics.jsonl"):
        steps.setdefault(row["step"], {}).update(numbers(row))
    for row in rows(run / "timing.jsonl"):
        if row["step"] in steps:
            steps[row["step"]].update(numbers(row, "timing/"))
    if growing and steps:
        del steps[max(steps)]
    return steps


def configuration(run, about):
    import yaml  # comes with wandb

    def typed(value):
        """YAML 1.1 takes 1e-8, without a point, for a word."""
        if isinstance(value, dict):
            return {str(key): typed(inner) for key, inner in value.items()}
        if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
            return float(value)
        return value

    return typed(yaml.safe_load((run / "config.yaml").read_text())) | {"run.json": about}


def load(run):
    """What is to be sent of a run, checked before anything is sent of any."""
    try:
        about = json.loads((run / "run.json").read_text())
        state_file = run / STATE
        sent = json.loads(state_file.read_text())["last_step"] if state_file.exists() else -1
        new = {step: values for step, values in sorted(values_by_step(run).items()) if step > sent}
        arm = f"{about['name']}-{about['config_hash']}"
        return run, arm, f"{arm}-s{about['seed']}", configuration(run, about), sent, new
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        fail(f"{run}: not files that temper wrote: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}", 2)
    except Exception as e:  # yaml's own errors, of many lines
        fail(f"{run}: config.yaml: {' '.join(str(e).split())}", 2)


def send(loaded, wandb, project, offline):
    run, arm, name, config, sent, new = loaded
    state_file = run / STATE
    if not new:
        print(f"{run}: nothing new after step {sent}", file=sys.stderr)
        return
    target = wandb.init(
        project=project, id=name, name=name, group=arm, resume="allow", mode="offline" if offline else "online",
        config=config,
    )
    for step, values in new.items():
        target.log(values, step=step)
    target.finish()
    # Written last: after a crash steps are sent again, and Weights & Biases drops what it has.
    state_file.write_text(json.dumps({"last_step": max(new)}) + "\n")
    print(f"{run}: sent {len(new)} steps, the last is {max(new)}", file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--project", default="temper")
    parser.add_argument("--offline", action="store_true", help="only write wandb/, for `wandb sync` later")
    arguments = parser.parse_args()
    for run in arguments.runs:
        if not (run / "run.json").is_file():
            fail(f"{run}: expected a run directory, found no run.json in it", 2)
    try:
        import wandb
    except ImportError:
        fail(f"wandb is not installed in {sys.executable}; pip install wandb", 1)
    for loaded in [load(run) for run in arguments.runs]:
        send(loaded, wandb, arguments.project, arguments.offline)


if __name__ == "__main__":
    main()
