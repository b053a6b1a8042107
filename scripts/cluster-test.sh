#!/usr/bin/env bash
# Brings a Kubernetes up on this machine, releases on it through canary and rollback, and takes it down again.
#
#   PERCH_KUBE_SCRIPTS  folder with build.sh, up.sh and down.sh (default ../shared/kube)
#   K8S_CACHE           where build.sh keeps what it made (default ~/.cache/perch-kube; 6 to 15 minutes the first time)
#
# Without root or those scripts it says so and is skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:?usage: cluster-test.sh PYTHON [pytest options]}
shift
kube=${PERCH_KUBE_SCRIPTS:-../shared/kube}
cache=${PERCH_IMAGE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/perch-images}
skip() {
  echo "cluster tests skipped: $1"
  exit 0
}
[ "$(id -u)" -eq 0 ] || skip "a node needs root"
[ -x "$kube/up.sh" ] || skip "$kube has no up.sh; name the folder by PERCH_KUBE_SCRIPTS"
command -v buildah >/dev/null || skip "buildah is missing; scripts/debian-packages.sh --images installs it"
kube=$(cd "$kube" && pwd)
export PERCH_KUBE_SCRIPTS=$kube

started=$SECONDS
phase() {
  printf '%7d s  %s\n' $((SECONDS - started)) "$1"
  started=$SECONDS
}
bash scripts/build-kubernetes.sh "$kube" >"${TMPDIR:-/tmp}/perch-kube-build.log" 2>&1 || {
  tail -n 20 "${TMPDIR:-/tmp}/perch-kube-build.log" >&2
  exit 1
}
phase "Kubernetes built, or found in the cache"
if [ -z "${PERCH_SERVING_IMAGE:-}" ]; then
  tag=$(bash docker/build.sh serving | sed -n 's/^perch-serving:\([^ ]*\) .*/\1/p')
  mkdir -p "$cache/archives"
  export PERCH_SERVING_IMAGE=localhost/perch-serving:$tag
  export PERCH_SERVING_ARCHIVE=$cache/archives/perch-serving.tar
  rm -f "$PERCH_SERVING_ARCHIVE"
  buildah push --quiet "perch-serving:$tag" "docker-archive:$PERCH_SERVING_ARCHIVE:$PERCH_SERVING_IMAGE"
fi
phase "image of the service"
trap 'bash "$kube/down.sh"' EXIT
# All that they need is here: what a test misses now is a fault.
CI=true "$python" -m pytest tests/cluster -m cluster --timeout 900 "$@"
phase "tests, each phase above"
