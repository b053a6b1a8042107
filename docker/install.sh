#!/bin/sh
# Installs a lock file, or the project without its dependencies, into /opt/perch, for one image:
#   install.sh LOCK | --project FOLDER | --slim | --compile [MODULE…]
# TARGET and TOOLS name other folders than an image's, for its test.
set -eu
target=${TARGET:-/opt/perch}
tools=${TOOLS:-/build/tools}
[ -x "$target/bin/python" ] || python3 -m venv --without-pip "$target"
packages=$(echo "$target"/lib/python3*/site-packages)
pip() {
  # pip stays outside of what is shipped.  It reads the building machine's configuration, which says where packages and
  # the CPU build of PyTorch come from.
  [ -x "$tools/bin/pip" ] || python3 -m venv "$tools"
  "$tools/bin/pip" --python "$target/bin/python" --quiet --disable-pip-version-check --no-cache-dir install --no-compile "$@"
}

case $1 in
--project)
  # Its dependencies are there; only the build tool that pyproject.toml names is fetched for it.
  pip --no-deps "$2"
  ;;
--slim)
  # What the service never loads, 120 MB: Arrow's servers and headers, ONNX Runtime's tools for makers of models and its
  # library for programs in C, of which its module for Python holds a copy of its own, the descriptions of AWS beyond S3
  # and logging in, and what only compilers and editors read.
  (
    cd "$packages"
    rm -rf pyarrow/include pyarrow/src pyarrow/libarrow_flight* pyarrow/_flight* pyarrow/libarrow_python_flight* \
      pyarrow/libarrow_python.so pyarrow/libarrow_python.so.*.*.* onnxruntime/transformers onnxruntime/tools onnxruntime/quantization \
      onnxruntime/capi/libonnxruntime.so*
    find numpy/_core/tests -mindepth 1 ! -name _natype.py -delete
    for service in botocore/data/*/; do
      case ${service%/} in */s3 | */sts | */sso | */sso-oidc | */signin) ;; *) rm -rf "$service" ;; esac
    done
    find . \( -name '*.pyx' -o -name '*.pxd' -o -name '*.pxi' -o -name '*.pyi' -o -name '*.c' -o -name '*.h' -o -name '*.a' \) -type f -delete
  )
  ;;
--compile)
  # Compiled here: the root file system of a container is read-only, and a start that compiles takes seconds longer.
  # With modules named, only what they import, which is a third.
  shift
  if [ $# -eq 0 ]; then
    "$target/bin/python" -m compileall -q -j 0 "$packages" || true # some ship templates that are no Python
  else
    for module in "$@"; do
      (cd / && "$target/bin/python" -c "import importlib, sys; importlib.import_module(sys.argv[1])" "$module")
    done
  fi
  ;;
*)
  # As scripts/make-environment.sh does it: which build of PyTorch there is, pip's configuration says, and the public
  # index has the one for CUDA.  That asks for NVIDIA's libraries, each in one version, which are in no lock.
  torch=$(grep '^torch==' "$1" || true)
  [ -z "$torch" ] || pip --constraint "$1" "$torch"
  # A lock of one Python for three: pip leaves out what its markers exclude.
  pip --no-deps --requirement "$1"
  # Tests of packages are half of some of them, and no program imports them; but NumPy's own, in part.
  find "$packages" -type d \( -name tests -o -name test \) ! -path '*/numpy/_core/tests' ! -path '*/torch/*' ! -path '*/sklearn/*' \
    -prune -exec rm -rf {} +
  # What is broken is to fail here, and not in the first container.
  [ -z "$torch" ] || (cd / && "$target/bin/python" -c "import torch")
  ;;
esac
