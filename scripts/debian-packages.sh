#!/usr/bin/env bash
# Installs the Debian packages that Perch and its tests need; what is there already is left alone.
# PostgreSQL is for the tests of the ledger on a real server; Chromium for the tests that look at pages; Prometheus for
# promtool, which checks the alert rules; wrk for the load of the serving benchmark.  With --images also what builds and
# runs the images without Docker.
set -euo pipefail

packages=(git make python3 python3-venv postgresql chromium prometheus wrk)
if [ "${1:-}" = --images ]; then
  packages+=(buildah podman runc crun netavark aardvark-dns debootstrap)
fi

missing=()
for package in "${packages[@]}"; do
  dpkg-query --show --showformat '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if [ ${#missing[@]} -eq 0 ]; then
  exit 0
fi

as_root=()
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null || {
    echo "These packages are missing and need root: ${missing[*]}" >&2
    exit 1
  }
  as_root=(sudo)
fi
export DEBIAN_FRONTEND=noninteractive
# Debian's postgresql would start a server of its own at installation; the tests start theirs.
"${as_root[@]}" mkdir -p /etc/postgresql-common
[ -e /etc/postgresql-common/createcluster.conf ] || echo 'create_main_cluster = false' | "${as_root[@]}" tee /etc/postgresql-common/createcluster.conf >/dev/null
"${as_root[@]}" apt-get update --quiet
"${as_root[@]}" apt-get install --quiet --yes --no-install-recommends "${missing[@]}"
