#!/usr/bin/env bash
# Builds the Kubernetes of the cluster tests with the scripts in KUBE, and mends one thing in it:
#
#   build-kubernetes.sh KUBE
#
# Kubernetes 1.20 carries reflect2 1.0.1, which walks maps by a function of Go's runtime that changed in Go 1.18: the API
# server falls over at the first custom object.  What reflect2 1.0.2 does instead is put in before it is compiled.
set -euo pipefail
kube=$(cd "${1:?usage: build-kubernetes.sh KUBE}" && pwd)
cache=${K8S_CACHE:-$HOME/.cache/perch-kube}
mended=$cache/bin/.walks-maps
[ -e "$mended" ] || rm -f "$cache/bin/hyperkube"
mend() {
  cat <<'PYTHON'
import sys
from pathlib import Path

folder = Path(sys.argv[1]) / "vendor/github.com/modern-go/reflect2"
link, maps = folder / "unsafe_link.go", folder / "unsafe_map.go"
rest = "t, h, buckets, bptr unsafe.Pointer; overflow, oldoverflow *[]unsafe.Pointer; startBucket uintptr; offset uint8; "
link.write_text(link.read_text().replace(
    "func mapiterinit(rtype unsafe.Pointer, m unsafe.Pointer) *hiter",
    "func mapiterinit(rtype unsafe.Pointer, m unsafe.Pointer, it *hiter)",
).replace("\t// rest fields are ignored\n", f"\t{rest}wrapped bool; B, i uint8; bucket, checkBucket uintptr\n"))
maps.write_text(maps.read_text().replace(
    "\treturn &UnsafeMapIterator{\n\t\thiter:      mapiterinit(type2.rtype, *(*unsafe.Pointer)(obj)),",
    "\tvar it hiter\n\tmapiterinit(type2.rtype, *(*unsafe.Pointer)(obj), &it)\n\treturn &UnsafeMapIterator{\n\t\thiter:      &it,",
))
assert "it *hiter)" in link.read_text() and "oldoverflow" in link.read_text() and "&it)" in maps.read_text(), "reflect2 is another one than expected"
PYTHON
}
file=$(mktemp)
trap 'rm -f "$file"' EXIT
mend >"$file"
sed -e "s|^HERE=.*|HERE=$kube|" -e "/patch_k8s.py \$K/a python3 $file \$K" "$kube/build.sh" | bash
touch "$mended"
