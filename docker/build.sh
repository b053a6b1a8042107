#!/usr/bin/env bash
# Builds images:  build.sh [serving] [pipeline] [airflow] [server]     (the first three by default)
#
#   BASE=…  their base image; without it, one is made here from Debian packages (make-base.sh, root)
#   TOOL=…  buildah (the default where it is installed) or docker
#   TAG=…   by default v<version>-<first 7 of the commit>, with -changes where the checkout was edited
#
# Each image's packages are listed in dist/images/<name>.cdx.json (CycloneDX).  The last lines have the size of each: all its
# layers unpacked, its base among them, in MB of 1,000,000 bytes.
set -euo pipefail
cd "$(dirname "$0")/.."
images=("$@")
[ ${#images[@]} -gt 0 ] || images=(serving pipeline airflow)
tool=${TOOL:-$(command -v buildah >/dev/null && echo buildah || echo docker)}
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' pipelines/__init__.py)
commit=$(git rev-parse HEAD)
changes=$([ -z "$(git status --porcelain)" ] || echo -changes)
tag=${TAG:-v$version-${commit:0:7}$changes}
base=${BASE:-docker.io/library/python:3.11-slim-bookworm}
if [ -z "${BASE:-}" ] && [ "$tool" = buildah ]; then
  base=$(bash docker/make-base.sh) || { echo "perch: the images' base cannot be made here; name one: make images BASE=…" >&2; exit 1; }
fi
mkdir -p dist/images
work=$(mktemp -d)
server=
finish() {
  [ -z "$server" ] || kill "$server"
  rm -rf "$work"
}
trap finish EXIT

# pip inside the build gets its packages from where pip here does.  Places of this machine are mounted for buildah; a build
# of Docker's sees none of them, so that it gets those that are folders by a server of files on the loopback interface.
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=python3
"$python" - "$work" <<'PYTHON'
import os, re, subprocess, sys
from pathlib import Path

work = Path(sys.argv[1])
settings, places = {}, set()
listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True).stdout
# The environment comes last, since it is what pip itself obeys before its files.
for line in sorted(listed.splitlines(), key=lambda line: line.startswith(":env:")):
    name, _, value = line.partition("=")
    value = value.strip("'\"").replace("\\n", "\n    ")
    settings[name.rpartition(".")[2]] = value
    places |= {found for found in re.findall(r"(?:file://)?(/[^\s'\"]+)", re.sub(r"https?://\S+", "", value)) if Path(found).exists()}
# An index in a folder, `…/simple`, has its files beside it.
places = {str(Path(place).parent) if Path(place).name == "simple" else place for place in places}
(work / "pip.conf").write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
(work / "volumes").write_text("".join(f"--volume={place}:{place}:ro\n" for place in sorted(places)))
(work / "places").mkdir()
for number, place in enumerate(sorted(filter(os.path.isdir, places), key=len, reverse=True)):
    (work / "places" / str(number)).symlink_to(place)
    settings = {
        name: re.sub(rf"(?:file://)?{re.escape(place)}(?=/|\s|$)", f"http://127.0.0.1:PORT/{number}", value)
        for name, value in settings.items()
    }
(work / "pip.docker.conf").write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
PYTHON
pip_of_docker=(--secret "id=pip.conf,src=$work/pip.docker.conf")
if [ "$tool" != buildah ] && [ -n "$(ls "$work/places")" ]; then
  "$python" -u -m http.server 0 --bind 127.0.0.1 --directory "$work/places" >"$work/server" 2>/dev/null &
  server=$!
  until grep -q "port [0-9]" "$work/server"; do kill -0 "$server" || exit 1; sleep 0.1; done
  sed -i "s|127.0.0.1:PORT|127.0.0.1:$(sed -n 's/.* port \([0-9]*\) .*/\1/p' "$work/server")|g" "$work/pip.docker.conf"
  pip_of_docker+=(--network host)
fi

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
    buildah rm "$container" >/dev/null
    size=$(buildah images --format '{{.Size}}' "$name" | tr --delete ' B' | numfmt --from=si --to-unit=1000000)
  else
    DOCKER_BUILDKIT=1 "$tool" build "${pip_of_docker[@]}" "${arguments[@]}" .
    container=$("$tool" create "$name")
    mkdir "$work/$image"
    "$tool" export "$container" | tar --extract --directory "$work/$image" opt/perch var/lib/dpkg/status
    "$python" docker/describe_image.py "$work/$image" "$image" "$tag" "dist/images/$image.cdx.json"
    "$tool" rm "$container" >/dev/null
    rm -rf "${work:?}/$image"
    size=$(("$("$tool" image inspect --format '{{.Size}}' "$name")" / 1000000))
  fi
  echo "$name  $size MB  $((SECONDS - started)) s  dist/images/$image.cdx.json"
done
