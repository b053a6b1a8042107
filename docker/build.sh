#!/usr/bin/env bash
# Builds images:  build.sh [serving] [pipeline] [airflow] [server]     (the first three by default)
#
#   BASE=…  their base image; without it, one is made here from Debian packages (make-base.sh, root)
#   TOOL=…  buildah (the default where it is installed) or docker
#   TAG=…   by default v<version>-<first 7 of the commit>, with -changes where the checkout was edited
#
# Each image's packages are listed in dist/images/<name>.cdx.json (CycloneDX), its size on the last lines.
set -euo pipefail
cd "$(dirname "$0")/.."
images=("$@")
[ ${#images[@]} -gt 0 ] || images=(serving pipeline airflow)
tool=${TOOL:-$(command -v buildah >/dev/null && echo buildah || echo docker)}
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' pipelines/__init__.py)
commit=$(git rev-parse HEAD)
changes=$([ -z "$(git status --porcelain)" ] || echo -changes)
tag=${TAG:-v$version-${commit:0:7}$changes}
base=${BASE:-$([ "$tool" = buildah ] && bash docker/make-base.sh || echo docker.io/library/python:3.11-slim-bookworm)}
mkdir -p dist/images
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# pip inside the build gets its packages from where pip here does; places of this machine are mounted for it.
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=python3
"$python" - "$work" <<'PYTHON'
import re, subprocess, sys
from pathlib import Path

work = Path(sys.argv[1])
settings, places = {}, set()
for line in subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True).stdout.splitlines():
    name, _, value = line.partition("=")
    value = value.strip("'\"").replace("\\n", "\n    ")
    settings[name.rpartition(".")[2]] = value
    places |= {found for found in re.findall(r"(?:file://)?(/[^\s'\"]+)", re.sub(r"https?://\S+", "", value)) if Path(found).exists()}
# An index in a folder, `…/simple`, has its files beside it.
places = {str(Path(place).parent) if Path(place).name == "simple" else place for place in places}
(work / "pip.conf").write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
(work / "volumes").write_text("".join(f"--volume={place}:{place}:ro\n" for place in sorted(places)))
PYTHON

for image in "${images[@]}"; do
  started=$SECONDS
  name=perch-$image:$tag
  arguments=(--file "docker/$image.Dockerfile" --tag "$name" --build-arg "BASE=$base" --build-arg "GIT_SHA=$commit$changes" --build-arg "VERSION=$version")
  if [ "$tool" = buildah ]; then
    mapfile -t volumes <"$work/volumes"
    buildah build --quiet --layers --network host --isolation "${BUILDAH_ISOLATION:-chroot}" \
      --secret "id=pip.conf,src=$work/pip.conf" "${volumes[@]}" "${arguments[@]}" . >/dev/null
    container=$(buildah from "$name")
    mount=$(buildah mount "$container")
    "$python" docker/describe_image.py "$mount" "$image" "$tag" "dist/images/$image.cdx.json"
    size=$(du --summarize --block-size=1M "$mount" | cut -f1)
    buildah rm "$container" >/dev/null
  else
    DOCKER_BUILDKIT=1 "$tool" build --secret "id=pip.conf,src=$work/pip.conf" "${arguments[@]}" .
    container=$("$tool" create "$name")
    mkdir "$work/$image"
    "$tool" export "$container" | tar --extract --directory "$work/$image" opt/perch
    "$python" docker/describe_image.py "$work/$image" "$image" "$tag" "dist/images/$image.cdx.json"
    size=$(("$("$tool" image inspect --format '{{.Size}}' "$name")" / 1048576))
    "$tool" rm "$container" >/dev/null
  fi
  echo "$name  $size MB  $((SECONDS - started)) s  dist/images/$image.cdx.json"
done
