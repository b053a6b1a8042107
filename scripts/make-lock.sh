#!/usr/bin/env bash
# Resolves pyproject.toml into requirements.lock: one environment for everything on Python 3.11 to 3.13, no addresses;
# and into serving/requirements.lock: the part of it, in the same versions, that a release needs.
# PyTorch's build (CPU or CUDA) is the machine's choice, so its local version and CUDA packages stay out of the lock.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=${1:?usage: make-lock.sh FOLDER}
# pip's setting for a folder of wheels is the only place that names a CPU build of PyTorch; uv does not read it.
export UV_FIND_LINKS=${UV_FIND_LINKS:-$("$environment/bin/python" -m pip config get global.find-links 2>/dev/null || true)}
{
  echo "# Made by \`make lock\` from pyproject.toml.  Installed by scripts/make-environment.sh: torch by pip, the rest by uv."
  "$environment/bin/uv" --quiet pip compile pyproject.toml --all-extras --group dev --python-version 3.11 --universal \
    --no-header --no-annotate |
    sed -E '/^torch==.*\+/d; s/^(torch==[^ ]+) ;.*/\1/; /^(nvidia-|cuda-|triton==)/{/^nvidia-ml-py/!d}'
} >requirements.lock.new
mv requirements.lock.new requirements.lock

# The part: a package is in it at the version that the whole environment was tested with, or the resolver says so here.
{
  echo "# Made by \`make lock\`: what a release needs, in the versions of the lock above it.  Packed into every release."
  "$environment/bin/uv" --quiet pip compile pyproject.toml --extra serving --python-version 3.11 --universal \
    --constraints requirements.lock --no-header --no-annotate
} >serving/requirements.lock.new
mv serving/requirements.lock.new serving/requirements.lock

# The images' parts likewise; the service's is the one above.
lock_image() {
  local name=$1
  shift
  {
    echo "# Made by \`make lock\`: what the image $name needs, in the versions of requirements.lock."
    "$environment/bin/uv" --quiet pip compile pyproject.toml "$@" --python-version 3.11 --universal \
      --constraints requirements.lock --no-header --no-annotate |
      sed -E '/^torch==.*\+/d; s/^(torch==[^ ]+) ;.*/\1/; /^(nvidia-|cuda-|triton==)/{/^nvidia-ml-py/!d}'
  } >"docker/$name.lock.new"
  mv "docker/$name.lock.new" "docker/$name.lock"
}
lock_image pipeline --extra pipeline
lock_image airflow --extra orchestration --extra release
