# A job: its start, its supervisor, its end.

try() { # LAUNCH ARGUMENTS...: temper in the job's environment, before there is a job
  launch=$1
  shift
  exec sh -c "$launch" launch "$@" </dev/null
}

# Starts attempt N of ID. LAUNCH is the script that runs temper in the job's environment.
submit() { # ID MODE(new|resume) EXECUTOR SNAPSHOT TOKENS AFTER LAUNCH OPTIONS TIMES ARGUMENTS...
  id=$1 mode=$2 executor=$3 snapshot=$4 tokens=$5 after=$6 launch=$7 options=$8 times=$9
  shift 9
  newest=$(newest_attempt "$id")
  if [ "$mode" = new ] && [ "$newest" -gt 0 ]; then fail 3 "$id: was submitted before"; fi
  if [ "$newest" -gt 0 ] && { alive "$root/jobs/$id/$newest" supervisor || alive "$root/jobs/$id/$newest" job; }; then
    fail 3 "$id: is still there"
  fi
  need_space 16777216
  mkdir -p "$root/jobs/$id"
  directory=$root/jobs/$id/$((newest + 1))
  # The one step that two clients cannot both take.
  mkdir "$directory" 2>/dev/null || fail 3 "$id: another client is submitting it"
  for name in boot_id supervisor.pid supervisor.ticks job.pid job.ticks phase token heartbeat exit_code started finished slurm; do
    slot "$directory/$name" ''
  done
  {
    printf '%s\n' "$agent" >"$directory/agent.sh" && printf '%s\n' "$launch" >"$directory/launch.sh" &&
      printf '%s\n' "$snapshot" >"$directory/snapshot" && printf '%s\n' "$after" >"$directory/after" &&
      printf '%s\n' "$tokens" >"$directory/tokens" && printf '%s\n' "$times" >"$directory/times" &&
      : >"$directory/log" && now >"$directory/submitted"
  } || { rm -rf "$directory"; fail 4 "$directory: cannot be written (no space?)"; }
  slot "$directory/boot_id" "$(boot_id)"
  slot "$directory/phase" queued
  case $executor in
  slurm) submit_to_slurm "$@" ;;
  *)
    setsid sh "$directory/agent.sh" supervise "$root" "$id" "$((newest + 1))" "$@" </dev/null >/dev/null 2>>"$directory/log" &
    tries=0
    while [ -z "$(read_slot "$directory/supervisor.pid")" ]; do
      tries=$((tries + 1))
      [ "$tries" -gt 100 ] && fail 1 "$directory: the job did not start"
      sleep 0.1
    done
    ;;
  esac
  printf 'job\t%s\nattempt\t%s\n' "$id" "$((newest + 1))"
}

submit_to_slurm() { # ARGUMENTS...; options: one per line
  command -v sbatch >/dev/null 2>&1 || { rm -rf "$directory"; fail 1 "sbatch: not found on this machine"; }
  batch=$directory/batch.sh
  {
    printf '#!/bin/sh\nexec sh'
    for one in "$directory/agent.sh" supervise "$root" "$id" "$((newest + 1))" "$@"; do
      printf " '%s'" "$(printf '%s' "$one" | sed "s/'/'\\\\''/g")"
    done
    printf '\n'
  } >"$batch"
  set -- --parsable "--job-name=$id" "--output=$directory/log" "--open-mode=append" "--chdir=$root"
  dependencies=
  while IFS=' ' read -r kind other; do
    [ -n "$other" ] || continue
    number=$(read_slot "$root/jobs/$other/$(newest_attempt "$other")/slurm")
    [ -n "$number" ] && dependencies=$dependencies,after$kind:$number
  done <"$directory/after"
  [ -n "$dependencies" ] && set -- "$@" "--dependency=${dependencies#,}"
  while IFS= read -r option; do [ -n "$option" ] && set -- "$@" "$option"; done <<OPTIONS
$options
OPTIONS
  number=$(sbatch "$@" "$batch" 2>"$directory/sbatch.err") ||
    { message=$(head -n 1 "$directory/sbatch.err"); rm -rf "$directory"; fail 1 "sbatch: $message"; }
  slot "$directory/slurm" "${number%%;*}"
}

# The process that owns an attempt: waits for other jobs, then for a GPU; starts the job in a session of its own; writes
# the heartbeat and at the end the exit code.
supervise() { # ID ATTEMPT ARGUMENTS...
  id=$1 directory=$root/jobs/$1/$2
  shift 2
  poll=$(cut -d' ' -f1 "$directory/times") beat=$(cut -d' ' -f2 "$directory/times")
  cd "$root" || exit 1
  TEMPER_JOB=$id
  export TEMPER_JOB
  child='' heart='' pause=''
  # What is cancelled while it waits never starts.
  trap 'if [ -n "$child" ]; then kill -TERM "-$child" 2>/dev/null; else end cancelled 143; fi' TERM INT HUP
  slot "$directory/boot_id" "$(boot_id)"
  slot "$directory/started" "$(now)"
  record_process "$directory" supervisor $$
  own_ticks=$(start_ticks $$)
  ( # A heartbeat ends with its supervisor.
    exec 8>&- 9>&-
    while [ "$(start_ticks $$)" = "$own_ticks" ]; do
      slot "$directory/heartbeat" "$(now)"
      sleep "$beat"
    done
  ) </dev/null >/dev/null 2>&1 &
  heart=$!

  if [ -z "$(read_slot "$directory/slurm")" ]; then
    slot "$directory/phase" waiting
    wait_for_others
    slot "$directory/phase" queued
    take_token
  fi
  slot "$directory/phase" running
  setsid sh "$directory/launch.sh" "$@" </dev/null >>"$directory/log" 2>&1 8>&- &
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
  exit 0
}

rest() { # in the background: a trap runs at once, not when a foreground sleep is over
  sleep "$poll" &
  pause=$!
  wait "$pause"
}

wait_for_others() {
  while IFS=' ' read -r kind other; do
    [ -n "$other" ] || continue
    while :; do
      theirs=$root/jobs/$other/$(newest_attempt "$other")
      code=$(read_slot "$theirs/exit_code")
      [ -n "$code" ] && break
      # Lost, with nobody to say how it ended.
      if ! alive "$theirs" supervisor && ! alive "$theirs" job; then code=lost && break; fi
      rest
    done
    if [ "$kind" = ok ] && [ "$code" != 0 ]; then
      printf 'temper: not started: %s, which this job runs after, ended with %s\n' "$other" "$code" >>"$directory/log"
      end skipped 125
    fi
  done <"$directory/after"
}

# Locks one of the attempt's tokens, first come first served: whoever has the queue's lock is next. The lock lies on the
# open file 9, which the job inherits: a process of the job that outlives it still holds its GPU, and is seen to.
take_token() {
  tokens=$(cat "$directory/tokens")
  [ -n "$tokens" ] || return 0
  queue=$root/locks/queue.$(printf %s "$tokens" | tr -c 'A-Za-z0-9' _)
  exec 8>>"$queue"
  flock 8 &
  pause=$!
  wait "$pause"
  while :; do
    for token in $tokens; do
      exec 9>>"$root/locks/$token"
      if flock -n 9; then
        printf '%s\n' "$id" >"$root/locks/$token"
        slot "$directory/token" "$token"
        exec 8>&-
        case $token in gpu-*) CUDA_VISIBLE_DEVICES=${token#gpu-} && export CUDA_VISIBLE_DEVICES ;; esac
        return 0
      fi
      exec 9>&-
    done
    rest
  done
}

cancel() { # ID GRACE_S
  attempt=$(newest_attempt "$1")
  directory=$root/jobs/$1/$attempt
  [ "$attempt" -gt 0 ] || fail 2 "$1: no such job"
  number=$(read_slot "$directory/slurm")
  if [ -n "$(read_slot "$directory/exit_code")" ]; then printf 'cancelled\tended\n' && return 0; fi
  : >"$directory/cancelled"
  [ -n "$number" ] && scancel --full --signal=TERM "$number" 2>/dev/null
  signal_attempt TERM
  left=$(($2 * 5))
  while [ "$left" -gt 0 ] && there; do
    sleep 0.2
    left=$((left - 1))
  done
  if ! there; then printf 'cancelled\tterm\n' && return 0; fi
  [ -n "$number" ] && scancel "$number" 2>/dev/null
  signal_attempt KILL
  printf 'cancelled\tkill\n'
}

# The job's process group (it leads a session), else its supervisor.
signal_attempt() { # SIGNAL
  if alive "$directory" job; then
    kill -"$1" "-$(read_slot "$directory/job.pid")" 2>/dev/null
  elif alive "$directory" supervisor; then
    kill -"$1" "-$(read_slot "$directory/supervisor.pid")" 2>/dev/null
  fi
}

there() {
  if [ -n "$number" ]; then [ -n "$(squeue -h -j "$number" -o %T 2>/dev/null)" ]; else
    alive "$directory" job || alive "$directory" supervisor
  fi
}
