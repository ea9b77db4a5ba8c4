#!/usr/bin/env bash
# Puts kustomize and promtool into a folder (default .cache/tools), for the checks in tests/deploy.
#
# Both come from Debian's packages; no root is needed and nothing is installed. The packages of a newer
# release than this machine's are taken, through lists of their own, because Debian 12 has no kustomize;
# the two programs need nothing but glibc. Works where apt and Debian's keyring are. Elsewhere install
# kustomize (or kubectl >= 1.27) and promtool by other means: the checks find them on PATH.
set -euo pipefail
cd "$(dirname "$0")/.."
release=trixie
target=$(realpath -m "${1:-.cache/tools}")
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

if [[ -x $target/kustomize && -x $target/promtool ]]; then
    exit 0
fi
for needed in apt-get dpkg-deb "$keyring"; do
    if ! command -v "$needed" >/dev/null && [[ ! -r $needed ]]; then
        echo "deploy/tools.sh: $needed is missing, so kustomize and promtool cannot be fetched" >&2
        exit 1
    fi
done

# the mirror that this machine is set up with
mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 'Component: main' |
    grep -m1 -E '/debian/?$' || true)
if [[ -z $mirror ]]; then
    echo "deploy/tools.sh: apt has no Debian mirror here" >&2
    exit 1
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$scratch"/{lists/partial,archives/partial,out} "$target"
echo "deb [signed-by=$keyring] $mirror $release main" >"$scratch/sources.list"
options=(
    -o "Dir::Etc::SourceList=$scratch/sources.list" -o Dir::Etc::SourceParts=-
    -o "Dir::State::Lists=$scratch/lists" -o "Dir::Cache=$scratch"
    -o "Dir::Cache::Archives=$scratch/archives" -o Acquire::Languages=none -o APT::Sandbox::User=root
)
apt-get "${options[@]}" -qq update
(cd "$scratch" && apt-get "${options[@]}" -qq download kustomize promtool)
for package in "$scratch"/*.deb; do
    dpkg-deb --extract "$package" "$scratch/out"
done
install -m 755 "$scratch"/out/usr/bin/{kustomize,promtool} "$target/"
