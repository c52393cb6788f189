#!/usr/bin/env bash
# E5c on a GPU machine, then E9a and E9b after it; watching, fetching, cleaning up.
#
#   scripts/a100.sh submit HOST [ARGUMENT...]   e5c, and e9a and e9b behind it; arguments go to every `temper submit`,
#                                               e.g. --set data.train=/data/gsm8k_train.jsonl --set seed=1 --dry-run
#   scripts/a100.sh watch HOST [SECONDS]        the host's jobs and GPUs, again and again
#   scripts/a100.sh logs HOST JOB               a job's log as it grows; Ctrl-C stops watching, never the job
#   scripts/a100.sh fetch HOST [ARGUMENT...]    the three run directories into runs/, e.g. --checkpoints latest
#   scripts/a100.sh clean HOST                  binaries, snapshots and records that no job needs; runs stay
#
# HOST is a host of hosts.yaml (see configs/hosts/example.yaml). Everything is done by temper; these are its commands.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit "$1"
}

[ $# -ge 2 ] || usage 2
action=$1 host=$2
shift 2
export TEMPER_HOSTS=${TEMPER_HOSTS:-hosts.yaml}
case $action in
  submit)
    answer=$("$TEMPER" --json submit configs/e5c.yaml --host "$host" "$@")
    echo "$answer"
    # Of several seeds each has its own e5c. A dry run has none.
    first=$(sed -n 's/.*"job":"\([^"]*\)".*/\1/p' <<<"$answer")
    # How e5c ends says nothing about the others: --after-any.
    for experiment in e9a e9b; do
      "$TEMPER" --json submit "configs/$experiment.yaml" --host "$host" --after-any "${first:-e5c}" "$@"
    done
    ;;
  watch)
    while clear && "$TEMPER" status --host "$host"; do sleep "${1:-30}"; done
    ;;
  logs) "$TEMPER" logs -f "${1:?JOB}" --host "$host" ;;
  fetch) "$TEMPER" fetch e5c e9a e9b --host "$host" "$@" ;;
  clean) "$TEMPER" clean --host "$host" --jobs ;;
  *) usage 2 ;;
esac
