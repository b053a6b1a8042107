#!/usr/bin/env bash
# The whole loop on a Kubernetes that is started for it and taken down again: images, chart, the training DAG in pods,
# a release through the canary, a bad model, and the release target's own tests.
#
#   cluster-test.sh PYTHON [tests, and pytest options; all of tests/cluster without]
#
#   PERCH_KUBE_SCRIPTS  folder with build.sh, up.sh and down.sh (default ../shared/kube)
#   K8S_CACHE           where build.sh keeps what it made (default ~/.cache/perch-kube; 5 to 15 minutes the first time)
#   PERCH_CLUSTER_COLD  no: be skipped where these are not cached yet, as CI wants it
#
# Where a part is missing it says which and is skipped, with exit code 0; a part that is there and fails is a failure, and
# so is another run, which has the same cluster, ports and archives.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:?usage: cluster-test.sh PYTHON [tests and pytest options]}
shift
kube=${PERCH_KUBE_SCRIPTS:-../shared/kube}
built=${K8S_CACHE:-$HOME/.cache/perch-kube}
cache=${PERCH_IMAGE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/perch-images}
log=$(mktemp)
work=$(mktemp -d)
trap 'rm -rf "$log" "$work"' EXIT
tests="cluster tests"
# shellcheck source=scripts/whole-test.sh
source scripts/whole-test.sh
alone "$cache/cluster-test.lock" "the cluster of the tests and their images"
[ "$(id -u)" -eq 0 ] || skip "a node needs root"
[ -x "$kube/up.sh" ] || skip "$kube has no up.sh; name the folder by PERCH_KUBE_SCRIPTS"
kube=$(cd "$kube" && pwd)
export PERCH_KUBE_SCRIPTS=$kube
if [ "${PERCH_CLUSTER_COLD:-}" = no ]; then
  [ -e "$built/bin/.walks-maps" ] || skip "no Kubernetes in $built; make cluster-test builds one"
  [ -e "$cache/archives/perch-pipeline.tar" ] || skip "no images in $cache; make cluster-test builds them"
fi
# What else would be found after minutes.
command -v prometheus >/dev/null || skip "prometheus is missing; scripts/debian-packages.sh installs it"
[ "$(df --output=avail --block-size=1G "$cache" | tail -n 1)" -ge 15 ] || skip "less than 15 GB are free for $cache"
unshare --net --mount --pid --fork --mount-proc true 2>"$log" || skip "this machine lets even root have no namespaces, which a node is made of"
node=${TMPDIR:-/tmp}/perch-kube
[ ! -e "$node/pids" ] || {
  echo "perch: a cluster is in $node already, of a run that was killed or of somebody's own" >&2
  echo "  what to do: where nobody needs it, take it down: bash $kube/down.sh" >&2
  exit 1
}

bash scripts/build-kubernetes.sh "$kube" >"$log" 2>&1 || { tail -n 20 "$log" >&2; exit 1; }
: >"$log"
phase "Kubernetes built, or found in the cache"
for program in buildah etcd containerd runc socat; do
  command -v "$program" >/dev/null || skip "$program is missing; $kube/build.sh installs its Debian package"
done
mkdir -p "$cache/archives"

# The tags stay, so that what an earlier call built is replaced and not kept beside it.
tag=cluster-test
give() { # NAME: what the tests are to know of an image, which is built unless somebody has named one
  local image=PERCH_${1^^}_IMAGE archive=PERCH_${1^^}_ARCHIVE
  if [ -z "${!archive:-}" ]; then
    TAG=$tag bash docker/build.sh "$1" 2>"$log" || { tail -n 20 "$log" >&2; return 1; }
    : >"$log"
    export "$image=localhost/perch-$1:$tag" "$archive=$cache/archives/perch-$1.tar"
    rm -f "${!archive}"
    buildah push --quiet "perch-$1:$tag" "docker-archive:${!archive}:${!image}"
  fi
}
bash docker/make-base.sh >/dev/null 2>"$log" || skip "the images' base cannot be made here"
: >"$log"
give serving
phase "image of the service"
give pipeline
phase "image of the steps"
# Both clusters, should the tests have been killed: the control plane that some have beside the node is in their own folder.
finish() {
  local run
  for run in "$work"/tests/control-plane*/run; do
    [ ! -d "$run" ] || K8S_RUN=$run bash "$kube/down.sh" || true
  done
  bash "$kube/down.sh" || true
  rm -rf "$log" "$work"
}
trap finish EXIT
# All that they need is here: what a test misses now is a fault.  A folder of their own, for pytest keeps only the last three
# of all that run on a machine.
CI=true "$python" -m pytest "${@:-tests/cluster}" -m cluster --timeout 900 --basetemp "$work/tests"
phase "tests, each phase above"
