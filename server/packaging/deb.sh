#!/bin/sh
# make server-package: the Debian package of the server's half, with the wheel that $1 names in it; built as
# packaging/deb.sh builds the device's.
set -eu

wheel=$(realpath -- "$1")
cd "$(dirname "$0")/.."
build=${BUILD:-../build}/server/deb

for program in dpkg-buildpackage dh; do
    command -v $program >/dev/null || {
        echo "make server-package: $program is missing: apt-get install dpkg-dev debhelper" >&2
        exit 1
    }
done

rm -rf "$build"
mkdir -p "$build/source"
cp nginx.conf nginx-metered.conf "$build/source"
cp -R packaging "$build/source"
# Debian's tools look for this folder at the root.
mv "$build/source/packaging/debian" "$build/source/debian"

(cd "$build/source" && WHEEL=$wheel dpkg-buildpackage --build=binary --no-sign -d) >"$build/log" 2>&1 || {
    tail -n 20 "$build/log" >&2
    echo "make server-package: failed; the whole log is $build/log" >&2
    exit 1
}
mv "$build"/*.deb "$build/../"
