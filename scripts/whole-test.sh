# What cluster-test.sh and compose-test.sh have in common, which read it.  shellcheck shell=bash
#
# skip WHY          what the log has, why the tests cannot be run here, and the end, with exit code 0; $tests says which tests
# phase NAME        a line with the seconds since the last one
# alone FILE WHAT   holds FILE until the script ends, and refuses where another run holds it
started=$SECONDS

skip() {
  if [ -s "$log" ]; then tail -n 20 "$log"; fi
  echo "$tests skipped: $1"
  exit 0
}

phase() {
  printf '%7d s  %s\n' $((SECONDS - started)) "$1"
  started=$SECONDS
}

alone() {
  mkdir -p "$(dirname "$1")"
  # Held by an open file, so that it is free when the script and the tests that it started have ended, however they did.
  exec {held}>>"$1"
  if ! flock --nonblock "$held"; then
    echo "perch: $2: another run uses them ($(cat "$1"))" >&2
    echo "  what to do: let it end, then try again; to wait for it: flock $1 true" >&2
    exit 75 # try again later, as perch's own exit codes have it
  fi
  echo "process $$, begun $(date --iso-8601=seconds) in $PWD" >"$1"
}
