#!/bin/bash
# A Debian as debootstrap makes it, with python3, python3-venv, make, git and a user `somebody`, in build/fresh/SUITE. It
# stays there for the next time, and its path is printed.
#
#     tests/fresh/tree.sh SUITE     bullseye, bookworm, trixie, forky
#
# Needs root and mmdebstrap(1).
set -eu

cd "$(dirname "$0")/../.."
suite=$1
# This machine's own, unless another one is named. What apt fills in looks like a shell's.
# shellcheck disable=SC2016
mirror=${DEBIAN_MIRROR:-$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' | grep -v security | head -n 1)}
folder=$PWD/${BUILD:-build}/fresh
tree=$folder/$suite
packages=python3,python3-venv,make,git

fail() {
    echo "fresh: $*" >&2
    exit 1
}

[ "$(id -u)" = 0 ] || fail "has to run as root: it mounts, and changes its root folder"
command -v mmdebstrap >/dev/null || fail "mmdebstrap is missing: apt-get install mmdebstrap"

# Whoever wants the same tree waits until it is made.
mkdir -p "$folder"
exec 8>"$folder/$suite.lock"
flock 8

# Made by another version of this script, it is made again.
recipe=$(cksum <tests/fresh/tree.sh)
if [ "$(cat "$tree/.complete" 2>/dev/null)" != "$recipe" ]; then
    rm -rf "$tree"
    mkdir -p "$tree"
    echo "fresh: fetching Debian $suite (once)" >&2
    # What a mirror has may be some weeks old: the signature counts, and not the day until which it was meant to.
    mmdebstrap --quiet --variant=minbase --aptopt='Acquire::Check-Valid-Until "false"' \
        --include="$packages" "$suite" "$tree" "$mirror" >&2
    chroot "$tree" useradd --create-home --shell /bin/bash somebody
    echo "$recipe" >"$tree/.complete"
fi

# The way to the package index is this machine's: its names, and the authorities that it believes.
cp -L /etc/resolv.conf /etc/hosts "$tree/etc/"
certificates=/etc/ssl/certs/ca-certificates.crt
if [ -e $certificates ]; then
    mkdir -p "$tree/etc/ssl/certs"
    cp -L $certificates "$tree$certificates"
fi

echo "$tree"
