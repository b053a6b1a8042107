#!/usr/bin/env bash
# Makes the virtual environment from the lock file:  make-environment.sh FOLDER
# Downloads are cached where pip and uv keep them, outside the checkout.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=${1:?usage: make-environment.sh FOLDER}
started=$SECONDS

fail() {
  printf 'perch: %s\n' "$*" >&2
  exit 1
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3.13 python3.12 python3.11 python3; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  return 1
}

python=$(find_python) || fail "no Python 3.11, 3.12 or 3.13 on PATH (python3 is $(python3 --version 2>&1 || true)).
  what to do: install one (Debian: scripts/debian-packages.sh), or name it: make PYTHON=/path/to/python3.11 …"
"$python" -c 'import venv, ensurepip' 2>/dev/null || fail "$python has no venv module.
  what to do: install it (Debian: scripts/debian-packages.sh installs python3-venv)"

needed_mb=6000
free_mb=$(df --output=avail --block-size=1M . | tail -n 1)
[ -x "$environment/bin/perch" ] || [ "$free_mb" -ge "$needed_mb" ] || fail "the disk of $PWD has $free_mb MB free (limit: $needed_mb MB for the environment).
  what to do: free some space, or clone to another disk"

echo "perch: making the environment with $("$python" --version) from requirements.lock (a few minutes the first time)"
[ -x "$environment/bin/python" ] || "$python" -m venv "$environment"
pip=("$environment/bin/python" -m pip --quiet --disable-pip-version-check)
"${pip[@]}" install "$(grep '^uv==' requirements.lock)"
# pip before uv for this one: pip's configuration is where a machine says which build of PyTorch it wants.
"${pip[@]}" install "$(grep '^torch==' requirements.lock)"
# Hard links from uv's cache where both lie on one disk, copies without a complaint where not.
export UV_LINK_MODE=${UV_LINK_MODE:-$([ "$(stat -c %d "$HOME" 2>/dev/null)" = "$(stat -c %d .)" ] && echo hardlink || echo copy)}
uv=("$environment/bin/uv" --quiet pip)
# Compiled once here rather than in each of the many processes that a run starts: their imports take half the time.
"${uv[@]}" install --python "$environment/bin/python" --compile-bytecode --requirements requirements.lock
"${uv[@]}" install --python "$environment/bin/python" --no-deps --editable .
touch "$environment/.installed"
echo "perch: environment ready in $((SECONDS - started)) s"
