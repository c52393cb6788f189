# Looking at jobs, fetching their files, cleaning up.

status() { # [ID...]
  [ $# -gt 0 ] || for directory in "$root/jobs"/*/; do
    directory=${directory%/}
    [ -d "$directory" ] && set -- "$@" "${directory##*/}"
  done
  printf 'now\t%s\n' "$(now)"
  printf 'free_bytes\t%s\n' "$(df -Pk "$root" 2>/dev/null | awk 'NR == 2 { printf "%.0f", $4 * 1024 }')"
  command -v nvidia-smi >/dev/null 2>&1 &&
    nvidia-smi --query-gpu=index,name,utilization.gpu,memory.used,memory.total,power.draw,temperature.gpu \
      --format=csv,noheader,nounits 2>/dev/null | sed 's/^/gpu\t/'
  for id; do
    attempt=$(newest_attempt "$id")
    [ "$attempt" -gt 0 ] || continue
    directory=$root/jobs/$id/$attempt
    printf 'job\t%s\nattempt\t%s\n' "$id" "$attempt"
    for name in phase token heartbeat exit_code started finished job.pid; do
      printf '%s\t%s\n' "$name" "$(read_slot "$directory/$name")"
    done
    printf 'submitted\t%s\n' "$(cat "$directory/submitted")"
    for one in supervisor job; do alive "$directory" "$one" && printf '%s_alive\tyes\n' "$one"; done
    [ "$(read_slot "$directory/boot_id")" = "$(boot_id)" ] && printf 'same_boot\tyes\n'
    [ -f "$directory/cancelled" ] && printf 'cancelled\tyes\n'
    number=$(read_slot "$directory/slurm")
    if [ -n "$number" ]; then
      state=$(squeue -h -j "$number" -o %T 2>/dev/null)
      [ -n "$state" ] || state=$(sacct -nX -j "$number" -o State 2>/dev/null | awk 'NR == 1 { print $1 }')
      printf 'slurm\t%s %s\n' "$number" "$state"
    fi
    metrics=$root/runs/$id/metrics.jsonl
    if [ -f "$metrics" ]; then
      for kind in train val; do
        grep "\"kind\":\"$kind\".*}\$" "$metrics" | tail -n 1 | sed "s/^/$kind\t/"
      done
      tail -n 1 "$root/runs/$id/timing.jsonl" 2>/dev/null | grep '}$' | sed 's/^/timing\t/'
    fi
    [ "$(read_slot "$directory/exit_code")" != 0 ] && tail -n 1 "$directory/log" 2>/dev/null | tr '\t' ' ' | cut -c 1-300 | sed 's/^/last_line\t/'
  done
  printf 'end\n'
}

# Ends with the job, or when the client closes stdin: a tail that nobody reads would stay for ever.
logs() { # ID FOLLOW LINES
  attempt=$(newest_attempt "$1")
  [ "$attempt" -gt 0 ] || fail 2 "$1: no such job"
  directory=$root/jobs/$1/$attempt
  if [ "$2" != follow ]; then exec tail -n "$3" "$directory/log"; fi
  exec 3<&0
  tail -n "$3" -f "$directory/log" &
  tail=$!
  trap 'kill "$tail" 2>/dev/null; exit 0' TERM HUP INT PIPE
  (cat <&3 >/dev/null; kill -TERM $$ 2>/dev/null) &
  reader=$!
  while [ -z "$(read_slot "$directory/exit_code")" ] && { there_or_waiting; } && start_ticks "$tail" >/dev/null; do
    sleep 0.5 &
    wait $!
  done
  sleep 0.5
  kill "$tail" "$reader" 2>/dev/null
  wait "$tail" 2>/dev/null
  return 0
}

there_or_waiting() {
  number=$(read_slot "$directory/slurm")
  there
}

# Every file that can be fetched, smallest first: size, then its path below ROOT.
manifest() { # ID CHECKPOINTS(none|latest|all)
  [ "$(newest_attempt "$1")" -gt 0 ] || fail 2 "$1: no such job"
  cd "$root" || fail 1 "$root: cannot be entered"
  latest=$(readlink "runs/$1/latest" 2>/dev/null)
  {
    find "jobs/$1" -type f -name log -printf '%s\t%p\n'
    [ -d "runs/$1" ] && find "runs/$1" -path "runs/$1/checkpoints" -prune -o -type f ! -name '.*' ! -name '*[[:cntrl:]]*' -printf '%s\t%p\n'
    case $2 in
    all) find "runs/$1/checkpoints" -type f ! -path '*/.*' ! -name '*[[:cntrl:]]*' -printf '%s\t%p\n' ;;
    latest) [ -n "$latest" ] && find "runs/$1/$latest" -type f ! -name '*[[:cntrl:]]*' -printf '%s\t%p\n' ;;
    esac
  } 2>/dev/null | sort -n
  [ "$2" != none ] && [ -n "$latest" ] && printf 'latest\t%s\n' "$latest"
  printf 'end\n'
}

# For each line "OFFSET SIZE PATH" of stdin: the bytes from OFFSET to SIZE, then the SHA-256 of the first SIZE bytes.
read_files() {
  cd "$root" || fail 1 "$root: cannot be entered"
  while read -r offset size path; do
    tail -c "+$((offset + 1))" "$path" | head -c "$((size - offset))"
    digest=$(head -c "$size" "$path" | sha256sum)
    printf '%s\n' "${digest%% *}"
  done
}

# Removes snapshots and blobs that no job which may still run needs; with `jobs` also the records of ended jobs (never runs).
clean() { # WHAT
  kept=
  for directory in "$root/jobs"/*/; do
    id=${directory%/} id=${id##*/}
    attempt=$(newest_attempt "$id")
    directory=$root/jobs/$id/$attempt
    [ "$attempt" -gt 0 ] || continue
    number=$(read_slot "$directory/slurm")
    if [ -z "$(read_slot "$directory/exit_code")" ] && there; then
      kept="$kept $(cat "$directory/snapshot")"
    elif [ "$1" = jobs ]; then
      rm -rf "${root:?}/jobs/$id" && printf 'removed\tjobs/%s\n' "$id"
    fi
  done
  for directory in "$root/snapshots"/*/; do
    hash=${directory%/} hash=${hash##*/}
    case " $kept " in *" $hash "*) continue ;; esac
    [ -d "$directory" ] && rm -rf "$directory" && printf 'removed\tsnapshots/%s\n' "$hash"
  done
  # A blob with one name left is in no snapshot.
  find "$root/blobs" -type f -links 1 -exec rm -f {} + -printf 'removed\tblobs/%f\n' 2>/dev/null
  printf 'end\n'
}
