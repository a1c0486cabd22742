#!/bin/bash
# A Debian as debootstrap makes it, with few packages and a user `somebody`, in build/NAME. It stays there for the next
# time, and its path is printed.
#
#     tests/world/tree.sh NAME SUITE [PACKAGES [SCRIPT]]
#
# SUITE: bullseye, bookworm, trixie, forky. PACKAGES, with commas: python3, python3-venv, make and git unless they are
# given. SCRIPT is what root's shell does in it once, with this machine's way to the package index. Needs root and
# mmdebstrap(1).
set -eu

cd "$(dirname "$0")/../.."
name=$1 suite=$2 packages=${3:-python3,python3-venv,make,git} script=${4-}
# This machine's own, unless another one is named. What apt fills in looks like a shell's.
# shellcheck disable=SC2016
mirror=${DEBIAN_MIRROR:-$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' | grep -v security | head -n 1)}
tree=$PWD/${BUILD:-build}/$name
certificates=/etc/ssl/certs/ca-certificates.crt

fail() {
    echo "tree: $*" >&2
    exit 1
}

[ "$(id -u)" = 0 ] || fail "has to run as root: it mounts, and changes its root folder"
command -v mmdebstrap >/dev/null || fail "mmdebstrap is missing: apt-get install mmdebstrap"

# Whoever wants the same tree waits until it is made.
mkdir -p "$(dirname "$tree")"
exec 8>"$tree.lock"
flock 8

# Made by another version of this script, or of other things, it is made again.
recipe=$(printf '%s\n' "$@" | cat tests/world/tree.sh - | cksum)
complete() {
    [ "$(cat "$tree/.complete" 2>/dev/null)" = "$recipe" ]
}
if ! complete; then
    rm -rf "$tree"
    mkdir "$tree"
    echo "tree: fetching Debian $suite into $tree (once)" >&2
    # What a mirror has may be some weeks old: the signature counts, and not the day until which it was meant to.
    mmdebstrap --quiet --variant=minbase --aptopt='Acquire::Check-Valid-Until "false"' \
        --include="$packages" "$suite" "$tree" "$mirror" >&2
    chroot "$tree" useradd --create-home --shell /bin/bash somebody
fi

# The way to the package index is this machine's: its names, and the authorities that it believes.
cp -L /etc/resolv.conf /etc/hosts "$tree/etc/"
if [ -e $certificates ]; then
    mkdir -p "$tree/etc/ssl/certs"
    cp -L $certificates "$tree$certificates"
fi

if ! complete; then
    # Everything that is mounted or started ends with the process that unshare(1) starts.
    # shellcheck disable=SC2016 # expanded by the shell that is started
    unshare --mount --pid --fork --kill-child bash -c '
        set -eu
        tree=$1 script=$2 certificates=$3
        mount --rbind /dev "$tree/dev"
        mount -t proc proc "$tree/proc"
        exec chroot "$tree" /usr/bin/env -i HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 \
            ${https_proxy:+https_proxy="$https_proxy"} PIP_CERT=$certificates SSL_CERT_FILE=$certificates \
            PIP_DISABLE_PIP_VERSION_CHECK=1 bash -euc "$script"
    ' bash "$tree" "$script" "$certificates" >&2
    echo "$recipe" >"$tree/.complete"
fi

echo "$tree"
