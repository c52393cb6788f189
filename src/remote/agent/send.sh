# Sending: the binary once, a snapshot for each configuration, and the runtime where asked.

probe() { # BLOB SNAPSHOT
  need flock setsid sha256sum df find
  mkdir -p "$root/blobs" "$root/snapshots" "$root/jobs" "$root/locks" "$root/runs" || fail 1 "$root: cannot be made"
  [ -w "$root" ] || fail 1 "$root: not writable"
  # What a lost connection or a power cut left of earlier transfers.
  find "$root/blobs" "$root/snapshots" -maxdepth 1 -name '.incoming.*' -mmin +1440 -exec rm -rf {} + 2>/dev/null
  printf 'system\t%s\n' "$(uname -srm)"
  printf 'root\t%s\n' "$root"
  printf 'free_bytes\t%s\n' "$(df -Pk "$root" | awk 'NR == 2 { printf "%.0f", $4 * 1024 }')"
  [ -f "$root/blobs/$1" ] && printf 'blob\tyes\n'
  [ -d "$root/snapshots/$2" ] && printf 'snapshot\tyes\n'
  [ -d "$root/runtime/torch" ] && printf 'runtime\tyes\n'
  return 0
}

receive_blob() { # SHA256 BYTES < content
  need_space "$2"
  incoming=$root/blobs/.incoming.$$
  trap 'rm -f "$incoming"' EXIT
  trap 'exit 1' HUP INT TERM PIPE
  cat >"$incoming" || fail 4 "$root: the file could not be written (no space?)"
  found=$(sha256sum <"$incoming")
  [ "${found%% *}" = "$1" ] || fail 1 "the connection ended before the whole file was there; nothing was kept"
  chmod 755 "$incoming" && mv "$incoming" "$root/blobs/$1" || fail 1 "$root/blobs/$1: cannot be written"
}

receive_snapshot() { # HASH BLOB CONFIG
  [ -d "$root/snapshots/$1" ] && return 0
  [ -f "$root/blobs/$2" ] || fail 1 "$root/blobs/$2: not there"
  incoming=$root/snapshots/.incoming.$$
  trap 'rm -rf "$incoming"' EXIT
  mkdir "$incoming" && ln "$root/blobs/$2" "$incoming/temper" && printf '%s' "$3" >"$incoming/config.yaml" ||
    fail 4 "$root/snapshots: cannot be written (no space?)"
  # Another client may have been faster; then its content is the same.
  mv -T "$incoming" "$root/snapshots/$1" 2>/dev/null || [ -d "$root/snapshots/$1" ] || fail 1 "$root/snapshots/$1: cannot be written"
}

install_runtime() { # PYTHON TORCH_VERSION
  [ -d "$root/runtime/torch" ] && return 0
  command -v "$1" >/dev/null 2>&1 || fail 2 "$1: not found on this machine; set libtorch to a directory that has torch"
  echo "installing torch==$2 into $root/runtime/venv" >&2
  { [ -d "$root/runtime/venv" ] || "$1" -m venv "$root/runtime/venv"; } >&2 &&
    "$root/runtime/venv/bin/python" -m pip install --progress-bar off "torch==$2" >&2 &&
    torch=$("$root/runtime/venv/bin/python" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])') &&
    ln -sfn "$torch" "$root/runtime/torch" || fail 1 "torch==$2 could not be installed into $root/runtime/venv"
}
