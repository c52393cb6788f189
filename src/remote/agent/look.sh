# Looking at jobs, fetching their files, cleaning up.

list() {
  for one in "$root/jobs"/*/; do
    one=${one%/}
    [ -d "$one" ] && printf 'job\t%s\n' "${one##*/}"
  done
  printf 'end\n'
}

status() { # [ID...]
  [ $# -gt 0 ] || for one in "$root/jobs"/*/; do
    one=${one%/}
    [ -d "$one" ] && set -- "$@" "${one##*/}"
  done
  printf 'now\t%s\n' "$(now)"
  printf 'free_bytes\t%s\n' "$(df -Pk "$root" 2>/dev/null | awk 'NR == 2 { printf "%.0f", $4 * 1024 }')"
  # A card that fell off the bus lets nvidia-smi hang.
  command -v nvidia-smi >/dev/null 2>&1 &&
    timeout 10 nvidia-smi --query-gpu=index,name,utilization.gpu,memory.used,memory.total,power.draw,temperature.gpu \
      --format=csv,noheader,nounits 2>/dev/null | sed 's/^/gpu\t/'
  numbers=
  for id; do
    directory=$root/jobs/$id/$(newest_attempt "$id")
    number=$(read_slot "$directory/slurm")
    [ -n "$number" ] && [ -z "$(read_slot "$directory/exit_code")" ] && numbers=$numbers,$number
  done
  [ -n "$numbers" ] && ask_slurm "${numbers#,}"
  for id; do
    attempt=$(newest_attempt "$id")
    [ "$attempt" -gt 0 ] || continue
    status_of "$id" "$attempt" "$root/jobs/$id/$attempt"
  done
  printf 'end\n'
}

status_of() { # ID ATTEMPT DIRECTORY
  # First who lives, then the exit code: a job that ends in between wrote its code before it went.
  living=
  for one in supervisor job; do alive "$3" "$one" && living="$living $one"; done
  beats_elsewhere "$3" && living="$living elsewhere"
  printf 'job\t%s\nattempt\t%s\nsubmitted\t%s\n' "$1" "$2" "$(cat "$3/submitted" 2>/dev/null)"
  for name in $living; do printf '%s_alive\tyes\n' "$name"; done
  code=$(read_slot "$3/exit_code")
  awk '{ sub(/ +$/, ""); name = FILENAME; sub(/.*\//, "", name); print name "\t" $0 }' \
    "$3/phase" "$3/token" "$3/heartbeat" "$3/exit_code" "$3/started" "$3/finished" "$3/job.pid" "$3/supervisor.pid"
  [ "$(read_slot "$3/boot_id")" = "$(boot_id)" ] && printf 'same_boot\tyes\n'
  [ -f "$3/cancelled" ] && printf 'cancelled\tyes\n'
  number=$(read_slot "$3/slurm")
  if [ -n "$number" ]; then
    if [ -z "$code" ]; then printf 'slurm\t%s %s\n' "$number" "$(slurm_state "$number")"; else printf 'slurm\t%s \n' "$number"; fi
  fi
  if [ "$(read_slot "$3/phase")" = queued ]; then
    for token in $(cat "$3/tokens"); do
      printf 'held\t%s %s\n' "$token" "$(cat "$root/locks/holder.$token" 2>/dev/null)"
    done
  fi
  metrics=$root/runs/$1/metrics.jsonl
  if [ -f "$metrics" ]; then
    tail -n 400 "$metrics" | grep '}$' |
      awk '/"kind":"train"/ { train = $0 } /"kind":"val"/ { val = $0 } END { if (train) print "train\t" train; if (val) print "val\t" val }'
    tail -n 1 "$root/runs/$1/timing.jsonl" 2>/dev/null | grep '}$' | sed 's/^/timing\t/'
  fi
  [ "$code" != 0 ] && tail -n 1 "$3/log" 2>/dev/null | tr '\t' ' ' | cut -c 1-300 | sed 's/^/last_line\t/'
  return 0
}

# Ends with the job, or when the client closes stdin: a tail that nobody reads would stay for ever.
logs() { # ID FOLLOW LINES
  attempt=$(newest_attempt "$1")
  [ "$attempt" -gt 0 ] || fail 2 "$1: no such job"
  directory=$root/jobs/$1/$attempt
  over() { [ -n "$(read_slot "$directory/exit_code")" ] || [ "$(presence "$directory")" = gone ]; }
  if [ "$2" != follow ] || over; then exec tail -n "$3" "$directory/log"; fi
  pace=0.5
  [ -n "$(read_slot "$directory/slurm")" ] && pace=10
  exec 3<&0
  (until over; do sleep "$pace"; done) </dev/null >/dev/null 2>&1 3<&- &
  watcher=$!
  # With its watcher's end it reads what is left and ends by itself.
  tail -n "$3" -f -s 0.2 --pid="$watcher" "$directory/log" 3<&- &
  tail=$!
  (cat <&3 >/dev/null 2>&1; kill "$tail" "$watcher" 2>/dev/null) >/dev/null 2>&1 &
  reader=$!
  trap 'kill "$tail" "$watcher" "$reader" 2>/dev/null; exit 0' TERM HUP INT PIPE
  wait "$tail"
  kill "$reader" "$watcher" 2>/dev/null
  return 0
}

# Every file that can be fetched, smallest first: size, then its path below ROOT.
manifest() { # ID CHECKPOINTS(none|latest|all)
  [ "$(newest_attempt "$1")" -gt 0 ] || fail 2 "$1: no such job"
  cd "$root" || fail 1 "$root: cannot be entered"
  latest=$(readlink "runs/$1/latest" 2>/dev/null)
  {
    find "jobs/$1" -type f -name log ! -path '*/.*' -printf '%s\t%p\n'
    [ -d "runs/$1" ] && find "runs/$1" -path "runs/$1/checkpoints" -prune -o -type f ! -name '.*' ! -name '*[[:cntrl:]]*' -printf '%s\t%p\n'
    case $2 in
    all) find "runs/$1/checkpoints" -type f ! -path '*/.*' ! -name '*[[:cntrl:]]*' -printf '%s\t%p\n' ;;
    latest) [ -n "$latest" ] && find "runs/$1/$latest" -type f ! -name '*[[:cntrl:]]*' -printf '%s\t%p\n' ;;
    esac
  } 2>/dev/null | sort -n
  [ "$2" != none ] && [ -n "$latest" ] && printf 'latest\t%s\n' "$latest"
  printf 'end\n'
}

# For each line "OFFSET SIZE PATH" of stdin: the bytes from OFFSET to SIZE, then the SHA-256 of the first SIZE bytes. What a file
# lost meanwhile comes as zeros, so that the digest is wrong and the next file in its place.
read_files() {
  cd "$root" || fail 1 "$root: cannot be entered"
  while read -r offset size path; do
    { tail -c "+$((offset + 1))" "$path" 2>/dev/null; cat /dev/zero; } 2>/dev/null | head -c "$((size - offset))"
    digest=$({ head -c "$size" "$path" 2>/dev/null || echo gone; } | sha256sum)
    printf '%s\n' "${digest%% *}"
  done
}

# Removes snapshots and blobs that no job which may still run needs and that have lain for some minutes (a submit on its way has
# no job yet); with `jobs` also the records of ended jobs, never runs.
clean() { # WHAT MINUTES
  hold_jobs
  kept='' needed=''
  for one in "$root/jobs"/*/; do
    id=${one%/} id=${id##*/}
    attempt=$(newest_attempt "$id")
    [ "$attempt" -gt 0 ] || continue
    directory=$root/jobs/$id/$attempt
    if [ -z "$(read_slot "$directory/exit_code")" ] && [ "$(presence "$directory")" != gone ]; then
      # With what it waits for: its end is still to be read.
      kept="$kept $(cat "$directory/snapshot")" needed="$needed $id $(cut -d' ' -f2 "$directory/after" | tr '\n' ' ')"
    fi
  done
  [ "$1" = jobs ] && for one in "$root/jobs"/*/; do
    id=${one%/} id=${id##*/}
    case " $needed " in *" $id "*) continue ;; esac
    [ -d "$one" ] && rm -rf "${root:?}/jobs/$id" && printf 'removed\tjobs/%s\n' "$id"
  done
  for one in "$root/snapshots"/*/; do
    hash=${one%/} hash=${hash##*/}
    case " $kept " in *" $hash "*) continue ;; esac
    [ -n "$(find "$root/snapshots/$hash" -maxdepth 0 -mmin "+$(($2 - 1))" 2>/dev/null)" ] &&
      rm -rf "$one" && printf 'removed\tsnapshots/%s\n' "$hash"
  done
  # A blob with one name left is in no snapshot.
  find "$root/blobs" -type f -links 1 -mmin "+$(($2 - 1))" -printf 'removed\tblobs/%f\n' -exec rm -f {} + 2>/dev/null
  printf 'end\n'
}
