# temper's part on the machine where jobs run: POSIX sh, sent over stdin with every call, so nothing need be installed.
#
#   OPERATION ROOT ARGUMENTS...        ROOT: absolute, or below the home directory
#
# ROOT/blobs/<sha256>                  the binary, once for all snapshots
# ROOT/snapshots/<hash>/               temper (a link to its blob) and config.yaml
# ROOT/jobs/<id>/<attempt>/            one start of a job: launch.sh, log, and the state below
# ROOT/runs/<id>/                      the run directory that temper itself writes
# ROOT/locks/                          slots, queues; `submit` is held by whoever makes or removes jobs
#
# A state file is written once at its full length and then overwritten in place: that works on a full disk too.
# Exit codes: 2 the request is wrong, 3 the job is there already, 4 no space, 1 anything else.
set -u
umask 022
LC_ALL=C
export LC_ALL

operation=$1 root=$2
shift 2
case $root in
/*) ;;
[~]) root=$HOME ;;
[~]/*) root=$HOME/${root#??} ;;
*) root=$HOME/$root ;;
esac
TEMPER_ROOT=$root
export TEMPER_ROOT

fail() { # CODE TEXT
  printf 'error: %s\n' "$2" >&2
  exit "$1"
}

slot() { printf '%-79s\n' "$2" 1<>"$1"; }                          # FILE VALUE
read_slot() { [ -f "$1" ] && sed 's/ *$//;q' "$1" 2>/dev/null; }   # FILE
boot_id() { cat /proc/sys/kernel/random/boot_id 2>/dev/null || echo unknown; }
namespace() { readlink /proc/self/ns/pid 2>/dev/null || echo unknown; }
now() { date +%s; }

# The time at which process $1 started, in ticks since boot; fails where there is none, or a zombie. A process number alone
# may have gone to somebody else.
start_ticks() {
  # shellcheck disable=SC2046 # words are wanted
  set -- $(sed 's/.*) //' "/proc/$1/stat" 2>/dev/null)
  [ $# -ge 20 ] && [ "$1" != Z ] && echo "${20}"
}

# Whether process numbers of an attempt are numbers of this machine and container, since it was last started.
numbers_hold() { # DIRECTORY
  [ "$(read_slot "$1/boot_id")" = "$(boot_id)" ] && [ "$(read_slot "$1/namespace")" = "$(namespace)" ]
}

alive() { # DIRECTORY NAME: is the process still there whose number and start are in NAME.pid and NAME.ticks?
  alive_ticks=$(read_slot "$1/$2.ticks") && [ -n "$alive_ticks" ] && numbers_hold "$1" &&
    [ "$(start_ticks "$(read_slot "$1/$2.pid")")" = "$alive_ticks" ]
}

record_process() { # DIRECTORY NAME PID
  slot "$1/$2.ticks" "$(start_ticks "$3")"
  slot "$1/$2.pid" "$3"
}

# Where the numbers do not hold, a young heartbeat says that the attempt runs somewhere else.
beats_elsewhere() { # DIRECTORY
  numbers_hold "$1" && return 1
  last=$(read_slot "$1/heartbeat") beat=$(cat "$1/beat" 2>/dev/null)
  [ -n "$last" ] && [ -n "$beat" ] && [ $(($(now) - last)) -lt $((12 * ${beat%.*} + 12)) ]
}

# `there`, `gone`, or `unknown`: what may be unknown is neither started again nor removed.
presence() { # DIRECTORY
  presence_number=$(read_slot "$1/slurm")
  if [ -n "$presence_number" ]; then
    ask_slurm "$presence_number"
    case $(slurm_state "$presence_number") in
    UNREACHABLE) echo unknown ;;
    PENDING | CONFIGURING | RUNNING | COMPLETING | SUSPENDED | REQUEUED | STOPPED | RESIZING) echo there ;;
    *) echo gone ;;
    esac
  elif alive "$1" job || alive "$1" supervisor; then
    echo there
  elif beats_elsewhere "$1"; then
    echo unknown
  else
    echo gone
  fi
}

# Sets slurm_answers to lines "NUMBER STATE" for what Slurm knows of NUMBERS, or to UNREACHABLE. What it has forgotten is absent.
ask_slurm() { # NUMBER[,NUMBER...]
  if ! slurm_answers=$(squeue -h -j "$1" -o '%i %T' 2>&1); then
    case $slurm_answers in
    *'Invalid job id'*) slurm_answers='' ;;
    *) slurm_answers=UNREACHABLE && return ;;
    esac
  fi
  command -v sacct >/dev/null 2>&1 || return 0
  # -P: states are not cut to ten characters.
  accounted=$(sacct -nXP -j "$1" -o JobID,State 2>/dev/null) || { [ -n "$slurm_answers" ] || slurm_answers=UNREACHABLE; return; }
  slurm_answers="$slurm_answers
$(printf '%s\n' "$accounted" | sed 's/|/ /')"
}

slurm_state() { # NUMBER
  [ "$slurm_answers" = UNREACHABLE ] && echo UNREACHABLE && return
  printf '%s\n' "$slurm_answers" | awk -v number="$1" '$1 == number { print $2; exit }'
}

newest_attempt() { # ID: the number of its newest attempt, 0 where it has none
  newest=0
  for one in "$root/jobs/$1"/*/; do
    one=${one%/} one=${one##*/}
    case $one in *[!0-9]* | '') ;; *) [ "$one" -gt "$newest" ] && newest=$one ;; esac
  done
  echo "$newest"
}

# Until this process ends or closes 7: nobody else makes or removes jobs.
hold_jobs() {
  exec 7>>"$root/locks/submit" && flock -w 120 7 || fail 1 "$root: another client is making or removing jobs"
}

need() { # COMMAND...
  for one; do
    command -v "$one" >/dev/null 2>&1 || fail 1 "$one: not found on this machine (Debian has it in util-linux or coreutils)"
  done
}

need_space() { # BYTES
  mkdir -p "$root" || fail 1 "$root: cannot be made"
  free_kib=$(df -Pk "$root" | awk 'NR == 2 { print $4 }')
  [ "$free_kib" -ge $(($1 / 1024 + 1024)) ] ||
    fail 4 "$root: no space: $((free_kib / 1024)) MiB free, needed $(($1 / 1048576 + 1)) MiB"
}
