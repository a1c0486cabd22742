#!/bin/sh
# make deb: builds the Debian package with Debian's own tools, from a copy of the sources, so that they stay as they are.
set -eu

cd "$(dirname "$0")/.."
build=${BUILD:-build}/deb

for program in dpkg-buildpackage dh dh_python3; do
    command -v $program >/dev/null || {
        echo "make deb: $program is missing: apt-get install dpkg-dev debhelper dh-python" >&2
        exit 1
    }
done
if [ -n "${CARAMEL_BAKE:-}" ]; then
    CARAMEL_BAKE=$(realpath -- "$CARAMEL_BAKE")
    # Before anything is built, where the message would be lost among those of the tools.
    python3 -B packaging/bake.py "$build/checked" || exit 1
    export CARAMEL_BAKE
fi

rm -rf "$build"
mkdir -p "$build/source"
# Listed, not copied whole: what lies around in a checkout is nobody's package.
cp -R caramel_embedded packaging setup.cfg setup.py LICENSE-* "$build/source"
# Debian's tools look for this folder at the root.
mv "$build/source/packaging/debian" "$build/source/debian"
mkdir -p "$build/source/buildroot/package"
cp -R buildroot/package/caramel-embedded "$build/source/buildroot/package"
find "$build/source" -name __pycache__ -prune -exec rm -rf {} +

(cd "$build/source" && dpkg-buildpackage --build=binary --no-sign -d) >"$build/log" 2>&1 || {
    tail -n 20 "$build/log" >&2
    echo "make deb: failed; the whole log is $build/log" >&2
    exit 1
}
mv "$build"/*.deb "${BUILD:-build}/"
ls "${BUILD:-build}"/*.deb
