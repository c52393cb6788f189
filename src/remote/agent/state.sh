# temper's part on the machine where jobs run: POSIX sh, sent over stdin with every call, so nothing need be installed.
#
#   OPERATION ROOT ARGUMENTS...        ROOT: absolute, or below the home directory
#
# ROOT/blobs/<sha256>                  the binary, once for all snapshots
# ROOT/snapshots/<hash>/               temper (a link to its blob) and config.yaml
# ROOT/jobs/<id>/<attempt>/            one start of a job: launch.sh, log, and the state below
# ROOT/runs/<id>/                      the run directory that temper itself writes
# ROOT/locks/<token>                   flock'ed by the job that has this GPU (or slot), and by its processes after it
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
'~') root=$HOME ;;
'~/'*) root=$HOME/${root#'~/'} ;;
*) root=$HOME/$root ;;
esac
TEMPER_ROOT=$root
export TEMPER_ROOT

fail() { # CODE TEXT
  printf 'error: %s\n' "$2" >&2
  exit "$1"
}

slot() { printf '%-39s\n' "$2" 1<>"$1"; }              # FILE VALUE
read_slot() { [ -f "$1" ] && sed 's/ *$//;q' "$1"; }   # FILE
boot_id() { cat /proc/sys/kernel/random/boot_id 2>/dev/null || echo unknown; }
now() { date +%s; }

# The time at which process $1 started, in ticks since boot; fails where there is none, or a zombie. A process number alone
# may have gone to somebody else.
start_ticks() {
  # shellcheck disable=SC2046 # words are wanted
  set -- $(sed 's/.*) //' "/proc/$1/stat" 2>/dev/null)
  [ $# -ge 20 ] && [ "$1" != Z ] && echo "${20}"
}

alive() { # DIRECTORY NAME: is the process still there whose number and start are in NAME.pid and NAME.ticks?
  alive_pid=$(read_slot "$1/$2.pid") && [ -n "$alive_pid" ] &&
    [ "$(read_slot "$1/boot_id")" = "$(boot_id)" ] &&
    [ "$(start_ticks "$alive_pid")" = "$(read_slot "$1/$2.ticks")" ]
}

record_process() { # DIRECTORY NAME PID
  slot "$1/$2.ticks" "$(start_ticks "$3")"
  slot "$1/$2.pid" "$3"
}

newest_attempt() { # ID: the number of its newest attempt, 0 where it has none
  newest=0
  for one in "$root/jobs/$1"/*/; do
    one=${one%/} one=${one##*/}
    case $one in *[!0-9]* | '') ;; *) [ "$one" -gt "$newest" ] && newest=$one ;; esac
  done
  echo "$newest"
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

