# A job: its start, its supervisor, its end.

# temper in the job's environment, before there is a job. The launch script, which may hold secrets, comes over stdin: `ps` shows
# arguments.
try() { # ARGUMENTS... < LAUNCH
  launch=$(cat)
  printf '%s\n' "$launch" | sh -s -- "$@"
}

# Starts the next attempt of a job. `launch`, over stdin, is the script that runs temper in the job's environment.
submit() { # KEY=VALUE... -- ARGUMENTS... < LAUNCH
  options=
  while [ "$1" != -- ]; do
    case ${1%%=*} in
    id | mode | executor | snapshot | tokens | after | options | poll | beat | locks) eval "${1%%=*}=\${1#*=}" ;;
    *) fail 2 "$1: not a key of submit" ;;
    esac
    shift
  done
  shift
  launch=$(cat)
  need_space 16777216
  hold_jobs
  newest=$(newest_attempt "$id")
  if [ "$newest" -gt 0 ]; then
    [ "$mode" = resume ] || fail 3 "$id: was submitted before"
    before=$root/jobs/$id/$newest
    if [ -z "$(read_slot "$before/exit_code")" ]; then
      case $(presence "$before") in
      there) fail 3 "$id: is still there" ;;
      unknown) fail 3 "$id: may still be there (it runs elsewhere, or Slurm does not answer)" ;;
      esac
    fi
  fi
  [ -d "$root/snapshots/$snapshot" ] || fail 1 "snapshot $snapshot: was removed meanwhile; submit again"
  # Prepared under another name: what has its number is complete.
  prepared=$root/jobs/$id/.new.$$
  directory=$root/jobs/$id/$((newest + 1))
  mkdir -p "$prepared"
  for name in boot_id namespace supervisor.pid supervisor.ticks job.pid job.ticks phase token heartbeat exit_code started finished slurm; do
    slot "$prepared/$name" ''
  done
  {
    printf '%s\n' "$agent" >"$prepared/agent.sh" && (umask 077 && printf '%s\n' "$launch" >"$prepared/launch.sh") &&
      printf '%s\n' "$snapshot" >"$prepared/snapshot" && printf '%s\n' "$after" >"$prepared/after" &&
      printf '%s\n' "$tokens" >"$prepared/tokens" && printf '%s\n' "$locks" >"$prepared/locks" &&
      printf '%s\n' "$poll" >"$prepared/poll" && printf '%s\n' "$beat" >"$prepared/beat" &&
      : >"$prepared/log" && now >"$prepared/submitted" && mv -T "$prepared" "$directory"
  } || { rm -rf "$prepared"; rmdir "$root/jobs/$id" 2>/dev/null; fail 4 "$root/jobs/$id: cannot be written (no space?)"; }
  slot "$directory/boot_id" "$(boot_id)"
  slot "$directory/namespace" "$(namespace)"
  slot "$directory/phase" queued
  if [ "$executor" = slurm ]; then submit_to_slurm "$@"; else start_detached "$@"; fi
  printf 'job\t%s\nattempt\t%s\n' "$id" "$((newest + 1))"
}

start_detached() { # ARGUMENTS...
  setsid sh "$directory/agent.sh" supervise "$root" "$id" "$((newest + 1))" "$@" </dev/null >/dev/null 2>>"$directory/log" 7>&- &
  tries=0
  while [ -z "$(read_slot "$directory/supervisor.pid")" ]; do
    tries=$((tries + 1))
    if [ "$tries" -gt 300 ]; then
      kill -KILL "-$!" 2>/dev/null
      slot "$directory/exit_code" 126
      fail 1 "$id: its supervisor did not start within 30 s"
    fi
    sleep 0.1
  done
}

submit_to_slurm() { # ARGUMENTS...; options: one per line
  command -v sbatch >/dev/null 2>&1 || { forget; fail 1 "sbatch: not found on this machine"; }
  batch=$directory/batch.sh
  {
    printf '#!/bin/sh\nexec sh'
    for one in "$directory/agent.sh" supervise "$root" "$id" "$((newest + 1))" "$@"; do
      printf " '%s'" "$(printf '%s' "$one" | sed "s/'/'\\\\''/g")"
    done
    printf '\n'
  } >"$batch"
  # TERM to the supervisor alone, two minutes before the time is up; a second start would find the first one's files.
  set -- --parsable "--job-name=$id" "--output=$directory/log" --open-mode=append "--chdir=$root" --signal=B:TERM@120 --no-requeue
  dependencies=
  while IFS=' ' read -r kind other; do
    [ -n "$other" ] || continue
    theirs=$root/jobs/$other/$(newest_attempt "$other")
    # Slurm forgets what ended long ago.
    code=$(read_slot "$theirs/exit_code")
    if [ "$kind" = ok ] && [ -n "$code" ] && [ "$code" != 0 ]; then
      forget
      fail 2 "$other, which this job is to run after, ended with $code"
    fi
    number=$(read_slot "$theirs/slurm")
    [ -n "$number" ] && [ -z "$code" ] && dependencies=$dependencies,after$kind:$number
  done <"$directory/after"
  [ -n "$dependencies" ] && set -- "$@" "--dependency=${dependencies#,}" --kill-on-invalid-dep=yes
  while IFS= read -r option; do [ -n "$option" ] && set -- "$@" "$option"; done <<OPTIONS
$options
OPTIONS
  number=$(sbatch "$@" "$batch" 2>"$directory/sbatch.err" 7>&-) ||
    { message=$(head -n 1 "$directory/sbatch.err"); forget; fail 1 "sbatch: $message"; }
  slot "$directory/slurm" "${number%%;*}"
}

forget() { # an attempt that was never started
  rm -rf "$directory"
  rmdir "$root/jobs/$id" 2>/dev/null
}

# The process that owns an attempt: waits for other jobs, then for a GPU; starts the job in a session of its own; writes
# the heartbeat and at the end the exit code.
supervise() { # ID ATTEMPT ARGUMENTS...
  id=$1 directory=$root/jobs/$1/$2
  shift 2
  poll=$(cat "$directory/poll") beat=$(cat "$directory/beat")
  cd "$root" || exit 1
  child='' heart='' pause='' passed=''
  # What is cancelled while it waits never starts. To temper a second TERM means: at once, without a checkpoint.
  trap 'if [ -z "$child" ]; then end cancelled 143; elif [ -z "$passed" ]; then passed=1; kill -TERM "-$child" 2>/dev/null; fi' TERM INT HUP
  slot "$directory/boot_id" "$(boot_id)"
  slot "$directory/namespace" "$(namespace)"
  slot "$directory/started" "$(now)"
  [ -n "${SLURM_JOB_ID:-}" ] && slot "$directory/slurm" "$SLURM_JOB_ID"
  slot "$directory/heartbeat" "$(now)"
  record_process "$directory" supervisor $$
  own_ticks=$(start_ticks $$)
  ( # A heartbeat ends with its supervisor.
    exec 8>&- 9>&-
    while [ -n "$own_ticks" ] && [ "$(start_ticks $$)" = "$own_ticks" ]; do
      slot "$directory/heartbeat" "$(now)"
      sleep "$beat"
    done
  ) </dev/null >/dev/null 2>&1 &
  heart=$!

  if [ -z "${SLURM_JOB_ID:-}" ]; then
    slot "$directory/phase" waiting
    wait_for_others
    slot "$directory/phase" queued
    take_token
  fi
  slot "$directory/phase" running
  # By the second variable every process of the attempt is known.
  TEMPER_JOB=$id TEMPER_ATTEMPT=$directory setsid sh "$directory/launch.sh" "$@" </dev/null >>"$directory/log" 2>&1 8>&- &
  child=$!
  record_process "$directory" job "$child"
  while :; do
    wait "$child"
    code=$?
    # A signal to this process ends the wait, not the job.
    start_ticks "$child" >/dev/null || break
  done
  # Where a signal ended the last wait, the job's own code is still to be had; else there is none any more (127).
  wait "$child" 2>/dev/null
  again=$?
  [ "$again" = 127 ] || code=$again
  end ended "$code"
}

end() { # PHASE CODE
  slot "$directory/phase" "$1"
  slot "$directory/finished" "$(now)"
  slot "$directory/exit_code" "$2"
  for one in $heart $pause; do kill "$one" 2>/dev/null; done
  # Slurm's own word for the end, its mails and dependencies, go by the batch script's code.
  exit "$2"
}

# A wait that a trap interrupts at once, which it does not in the foreground.
wait_for() { # PID of a child
  pause=$1
  wait "$pause"
  # A number that was waited for may go to somebody else.
  pause=''
}

rest() {
  sleep "$poll" &
  wait_for $!
}

wait_for_others() {
  while IFS=' ' read -r kind other; do
    [ -n "$other" ] || continue
    while :; do
      theirs=$root/jobs/$other/$(newest_attempt "$other")
      state=$(presence "$theirs")
      code=$(read_slot "$theirs/exit_code")
      [ -n "$code" ] && break
      # Lost, with nobody to say how it ended. Its code is read after its presence: it writes one, then goes.
      if [ "$state" = gone ]; then code=lost && break; fi
      rest
    done
    if [ "$kind" = ok ] && [ "$code" != 0 ]; then
      printf 'temper: not started: %s, which this job runs after, ended with %s\n' "$other" "$code" >>"$directory/log"
      end skipped 125
    fi
  done <"$directory/after"
}

# Where the locks of a token lie: GPUs belong to the machine, whoever's job and whichever root, slots to the root.
locks_of() { # TOKEN; locks: the host's own directory for GPUs, or nothing
  case $1 in
  gpu-*) printf '%s' "${locks:-${TEMPER_LOCKS:-/tmp/temper-locks}}" ;;
  *) printf '%s' "$root/locks" ;;
  esac
}

# Locks one of the attempt's tokens, first come first served: whoever has the queue's lock is next. The lock lies on the
# open file 9, which the job inherits: a process of the job that outlives it still holds its GPU, and is seen to.
take_token() {
  tokens=$(cat "$directory/tokens") locks=$(cat "$directory/locks")
  [ -n "$tokens" ] || return 0
  queue=$(printf %s "$tokens" | sha256sum)
  exec 8>>"$root/locks/queue.${queue%% *}"
  flock 8 &
  wait_for $!
  while :; do
    for token in $tokens; do
      place=$(locks_of "$token")
      mkdir -p -m 1777 "$place" 2>/dev/null
      # Opened for reading: another user's file may not be opened for writing there, and a lock needs neither.
      [ -e "$place/$token" ] || : >"$place/$token"
      exec 9<"$place/$token"
      if flock -n 9; then
        printf '%s\n' "$id" 2>/dev/null >"$root/locks/holder.$token"
        slot "$directory/token" "$token"
        exec 8>&-
        case $token in
        gpu-*)
          # The order that nvidia-smi and this host's list of GPUs have.
          CUDA_VISIBLE_DEVICES=${token#gpu-} CUDA_DEVICE_ORDER=PCI_BUS_ID
          export CUDA_VISIBLE_DEVICES CUDA_DEVICE_ORDER
          ;;
        esac
        return 0
      fi
      exec 9<&-
    done
    rest
  done
}

# The processes of an attempt, those too that left its group: all have its directory in their environment.
members() { # DIRECTORY
  for file in $(grep -slzxF "TEMPER_ATTEMPT=$1" /proc/[0-9]*/environ 2>/dev/null); do
    number=${file#/proc/} number=${number%/environ}
    start_ticks "$number" >/dev/null && printf '%s\n' "$number"
  done
}

cancel() { # ID GRACE_S
  attempt=$(newest_attempt "$1")
  directory=$root/jobs/$1/$attempt
  [ "$attempt" -gt 0 ] || fail 2 "$1: no such job"
  slurm_number=$(read_slot "$directory/slurm")
  if [ -n "$slurm_number" ]; then
    cancel_in_slurm "$2"
    return
  fi
  ended=$(read_slot "$directory/exit_code")
  if [ -n "$ended" ] && [ -z "$(members "$directory")" ]; then printf 'cancelled\tended\n' && return 0; fi
  [ "$(presence "$directory")" = unknown ] && fail 1 "$1: runs in another container or on another machine; cancel it there"
  [ -n "$ended" ] || : >"$directory/cancelled"
  if alive "$directory" job; then
    kill -TERM "-$(read_slot "$directory/job.pid")" 2>/dev/null
  elif alive "$directory" supervisor; then
    # Alone: what it waits with is its own to end.
    kill -TERM "$(read_slot "$directory/supervisor.pid")" 2>/dev/null
  fi
  left=$(($2 * 5))
  while [ "$left" -gt 0 ] && { alive "$directory" job || alive "$directory" supervisor; }; do
    sleep 0.2
    left=$((left - 1))
  done
  how=term
  # Whatever is left, the leader gone or not, and what left its group.
  left=$(members "$directory")
  if [ -n "$left" ]; then
    for number in $left; do kill -TERM "$number" 2>/dev/null; done
    sleep 1
    for number in $(members "$directory"); do how=kill && kill -KILL "$number" 2>/dev/null; done
  fi
  if alive "$directory" supervisor && [ -z "$(read_slot "$directory/job.pid")" ]; then
    how=kill && kill -KILL "$(read_slot "$directory/supervisor.pid")" 2>/dev/null
  fi
  printf 'cancelled\t%s\n' "$how"
}

cancel_in_slurm() { # GRACE_S
  ask_slurm "$slurm_number"
  case $(slurm_state "$slurm_number") in
  UNREACHABLE) fail 1 "Slurm does not answer" ;;
  PENDING | CONFIGURING)
    : >"$directory/cancelled"
    scancel "$slurm_number" && printf 'cancelled\tterm\n'
    return
    ;;
  esac
  if [ "$(presence "$directory")" = gone ]; then printf 'cancelled\tended\n' && return 0; fi
  : >"$directory/cancelled"
  # To the supervisor alone, which passes it on once.
  scancel --batch --signal=TERM "$slurm_number"
  left=$1
  while [ "$left" -gt 0 ]; do
    [ -n "$(read_slot "$directory/exit_code")" ] && printf 'cancelled\tterm\n' && return 0
    sleep 1
    left=$((left - 1))
  done
  scancel "$slurm_number" && printf 'cancelled\tkill\n'
}
