#!/usr/bin/env bash
# docker/compose.yaml as a whole, on a Docker Engine that is started for it in namespaces of its own and taken down again.
#
#   compose-test.sh PYTHON [pytest options; all of tests/compose without]
#
#   PERCH_IMAGE_CACHE  where the engine's files and the stand-ins' are kept (default ~/.cache/perch-images)
#
# Engine and Compose are Debian's, and so is what stands for the images of others (tests/compose/stand_ins): no registry is
# asked.  Neither this machine's firewall nor its mounts change, and its own Docker, where it has one, is not touched.
# Where a part is missing it says which and is skipped, with exit code 0; a part that is there and fails is a failure.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:?usage: compose-test.sh PYTHON [pytest options]}
shift
cache=${PERCH_IMAGE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/perch-images}/compose
tag=compose-test
work=$(mktemp -d)
log=$work/log
trap 'rm -rf "$work"' EXIT
tests="tests of compose.yaml"
# shellcheck source=scripts/whole-test.sh
source scripts/whole-test.sh
alone "$cache/compose-test.lock" "the Docker Engine of the tests and its images"
[ "$(id -u)" -eq 0 ] || skip "a Docker Engine needs root"
for program in buildah debootstrap nsenter unshare ip; do
  command -v "$program" >/dev/null || skip "$program is missing; scripts/debian-packages.sh --images installs it"
done
mkdir -p "$cache"
[ "$(df --output=avail --block-size=1G "$cache" | tail -n 1)" -ge 15 ] || skip "less than 15 GB are free for $cache"
unshare --net --mount --pid --fork --mount-proc true 2>"$log" || skip "this machine lets even root have no namespaces"

# A Debian of its own for the engine, and one for the stand-ins, of which each is made once.  Debian unstable has the
# PostgreSQL, Prometheus and Alertmanager nearest to the originals.
within() { # FOLDER COMMAND: what packages set up themselves looks into /proc
  # shellcheck disable=SC2016 # the inner shell's
  unshare --mount sh -euc 'mount -t proc proc "$1/proc"; exec chroot "$@"' sh "$@"
}
debian() { # NAME SUITE PACKAGES [COMMAND in it]
  [ "$(cat "$cache/$1/.complete" 2>/dev/null)" = "$2 $3" ] && return
  rm -rf "${cache:?}/$1"
  mkdir -p "$cache/$1/usr/sbin" "$cache/$1/etc/postgresql-common"
  printf '#!/bin/sh\nexit 101\n' >"$cache/$1/usr/sbin/policy-rc.d" # no package starts its service
  chmod +x "$cache/$1/usr/sbin/policy-rc.d"
  echo "create_main_cluster = false" >"$cache/$1/etc/postgresql-common/createcluster.conf"
  debootstrap --variant=minbase "$2" "$cache/$1" &&
    cp /etc/resolv.conf "$cache/$1/etc/resolv.conf" &&
    DEBIAN_FRONTEND=noninteractive within "$cache/$1" apt-get install --yes --no-install-recommends $3 &&
    { [ -z "${4:-}" ] || within "$cache/$1" sh -euc "$4"; } &&
    rm -rf "$cache/$1"/var/cache/apt/archives/*.deb "$cache/$1"/var/lib/apt/lists/* && echo "$2 $3" >"$cache/$1/.complete"
}
debian engine trixie "docker.io docker-cli docker-buildx docker-compose containerd runc iptables iproute2 procps tini ca-certificates" \
  >"$log" 2>&1 || skip "Debian's Docker cannot be installed into $cache"
debian stand-ins sid "postgresql-18 prometheus prometheus-alertmanager busybox ca-certificates" '
  sed -i "s/^postgres:x:[0-9]*:[0-9]*:/postgres:x:999:999:/" /etc/passwd
  rm -rf /var/lib/postgresql
  mkdir -p /var/lib/postgresql /var/lib/grafana /prometheus /alertmanager
  chown 999:999 /var/lib/postgresql
  chown 472:0 /var/lib/grafana
  chown 65534:65534 /prometheus /alertmanager
  ln -sf busybox /usr/bin/wget' >"$log" 2>&1 || skip "the stand-ins' packages cannot be installed into $cache"
: >"$log"
phase "engine and stand-ins installed, or found in the cache"
TAG=$tag bash docker/build.sh server >"$work/built" 2>"$log" || { tail -n 20 "$log" >&2; exit 1; }
: >"$log"
phase "image of the server"

# The engine: its first process is tini, with which all of its containers end; and it is started again where a test ends it.
engine=$cache/engine
checkout=$engine/srv/perch
rm -rf "$engine/var/lib/docker" "$engine/srv"
mkdir -p "$checkout" "$engine/.old"
git archive HEAD | tar --extract --directory "$checkout"
# As the working tree has it: what is tried is what is about to be committed.
cp -a docker params.yaml expectations "$checkout"
rm -f "$checkout/docker/.env"
cat >"$work/begin" <<'INIT'
set -euo pipefail
engine=$1
mount --make-rprivate /
mount --bind "$engine" "$engine"
mount -t proc proc "$engine/proc"
mount -t sysfs sysfs "$engine/sys"
mount -t tmpfs tmpfs "$engine/sys/fs/cgroup"
if [ -e /sys/fs/cgroup/cgroup.controllers ]; then
  mount --rbind /sys/fs/cgroup "$engine/sys/fs/cgroup"
else
  for hierarchy in /sys/fs/cgroup/*/; do
    mkdir "$engine/sys/fs/cgroup/$(basename "$hierarchy")"
    mount --bind "$hierarchy" "$engine/sys/fs/cgroup/$(basename "$hierarchy")"
  done
fi
mount --rbind /dev "$engine/dev"
mount -t tmpfs tmpfs "$engine/run"
ip link set lo up
cd "$engine"
pivot_root . .old
umount --lazy /.old
exec env --ignore-environment PATH=/usr/sbin:/usr/bin HOME=/root tini -- \
  sh -c 'while :; do dockerd --host=unix:///run/docker.sock --storage-driver=overlay2; sleep 1; done'
INIT
unshare --net --mount --pid --fork --mount-proc bash "$work/begin" "$engine" >"$work/dockerd.log" 2>&1 &
unshared=$!
finish() {
  kill "$(pgrep --parent "$unshared")" 2>/dev/null || true
  wait "$unshared" 2>/dev/null || true
  rm -rf "$engine/var/lib/docker" "$engine/srv" "$work"
}
trap finish EXIT
inside() {
  nsenter --target "$(pgrep --parent "$unshared")" --mount --net --pid --root --wdns=/srv/perch \
    env --ignore-environment PATH=/usr/sbin:/usr/bin HOME=/root DOCKER_BUILDKIT=0 "$@"
}
for _ in $(seq 60); do
  inside docker version >/dev/null 2>&1 && break
  kill -0 "$unshared" 2>/dev/null || break
  sleep 1
done
inside docker version >/dev/null 2>&1 || { tail -n 20 "$work/dockerd.log" >&2; skip "no Docker Engine runs here"; }
phase "Docker Engine started"

# docker/build.sh with Docker, which it is called with elsewhere than here: the engine reaches no network, so that base and
# packages are given to it.
pid=$(pgrep --parent "$unshared")
base=$(bash docker/make-base.sh 2>"$log") || { tail -n 20 "$log" >&2; exit 1; }
buildah push --quiet "$base" "docker-archive:$engine/srv/base.tar:$base"
inside docker load --quiet --input /srv/base.tar >/dev/null
rm "$engine/srv/base.tar"
"$python" -m pip --quiet download --no-deps --only-binary :all: --python-version 3.11 --dest "$cache/wheels" \
  --requirement serving/requirements.lock >"$log" 2>&1 &&
  "$python" -m pip --quiet download --dest "$cache/wheels" "$(sed -n 's/^requires = \["\(.*\)"\]/\1/p' pyproject.toml)" >"$log" 2>&1 ||
  { tail -n 20 "$log" >&2; exit 1; }
mkdir "$work/docker"
echo "{\"cliPluginsExtraDirs\": [\"$engine/usr/libexec/docker/cli-plugins\"]}" >"$work/docker/config.json"
nsenter --target "$pid" --net env DOCKER_CONFIG="$work/docker" DOCKER_HOST="unix:///proc/$pid/root/run/docker.sock" \
  PIP_NO_INDEX=1 PIP_FIND_LINKS="$cache/wheels" TOOL="$engine/usr/bin/docker" BASE="$base" TAG=$tag \
  bash docker/build.sh serving 2>"$log" || { tail -n 20 "$log" >&2; exit 1; }
: >"$log"
phase "image of the service, built by Docker"

buildah push --quiet "perch-server:$tag" "docker-archive:$engine/srv/server.tar:perch-server:$tag"
inside docker load --quiet --input /srv/server.tar
rm "$engine/srv/server.tar"
tar --directory "$cache/stand-ins" --exclude './proc/*' --exclude './dev/*' --create . | inside docker import - perch-stand-ins >/dev/null
cp -a tests/compose/stand_ins "$engine/srv/stand_ins"
mkdir "$engine/srv/stand_ins/data"
"$python" - "$engine/srv/stand_ins/moto" <<'PYTHON'
import shutil, sys
from importlib.metadata import files
from pathlib import Path

for name in ("moto", "responses", "xmltodict", "py-partiql-parser", "flask-cors"):
    for file in files(name) or ():
        if ".." not in file.parts and "__pycache__" not in file.parts:
            there = Path(sys.argv[1]) / file
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file.locate(), there)
PYTHON
sed -n 's|^ *image: \(docker.io/.*/\([a-z]*\):.*\)|\1 \2|p' docker/compose.yaml | while read -r image target; do
  inside docker build --quiet --build-arg "PERCH_IMAGE=perch-server:$tag" --target "$target" --tag "$image" /srv/stand_ins </dev/null >/dev/null 2>"$log" ||
    { tail -n 20 "$log" >&2; exit 1; }
done
phase "images loaded"

PERCH_COMPOSE_ENGINE=$pid PERCH_COMPOSE_CHECKOUT=$checkout PERCH_COMPOSE_IMAGE=perch-server:$tag CI=true \
  nsenter --target "$pid" --net "$python" -m pytest "${@:-tests/compose}" -m compose --timeout 1800 --basetemp "$work/tests"
phase "tests"
