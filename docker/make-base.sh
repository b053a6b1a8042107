#!/usr/bin/env bash
# Makes the images' base from Debian packages where no registry can be reached:  make-base.sh
# What it leaves is localhost/perch-base:bookworm in buildah's storage, and a copy of its files outside the checkout.
set -euo pipefail
cache=${PERCH_IMAGE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/perch-images}
root=$cache/base-root
name=localhost/perch-base:bookworm

if [ ! -e "$root/.complete" ]; then
  command -v debootstrap >/dev/null || { echo "perch: debootstrap is missing; scripts/debian-packages.sh --images installs it" >&2; exit 1; }
  [ "$(id -u)" -eq 0 ] || { echo "perch: debootstrap needs root; or name a base: make images BASE=…" >&2; exit 1; }
  rm -rf "$root"
  mkdir -p "$cache"
  debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$root" >"$cache/debootstrap.log" ||
    { tail -n 20 "$cache/debootstrap.log" >&2; exit 1; }
  rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* "$root"/usr/share/doc/* "$root"/usr/share/locale/* "$root"/usr/share/man/*
  touch "$root/.complete"
fi
if ! buildah images --quiet "$name" >/dev/null 2>&1; then
  container=$(buildah from scratch)
  buildah add --quiet "$container" "$root" / >/dev/null
  buildah config --env PATH=/usr/local/bin:/usr/bin:/bin --cmd /bin/sh "$container"
  buildah commit --quiet "$container" "$name" >/dev/null
  buildah rm "$container" >/dev/null
fi
echo "$name"
