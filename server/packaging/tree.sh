#!/bin/bash
# A new Debian 12 with systemd, for the test that walks the page for server administrators, with all that its
# installation fetches from elsewhere: $1 are the Debian packages, $2 what pip installs into /opt/caramel. It is made once
# and stays in build/server-tree. The walk itself has no network.
#
# Needs root and mmdebstrap(1).
set -eu

cd "$(dirname "$0")/../.."
# What apt fills in looks like a shell's.
# shellcheck disable=SC2016
here=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' | grep -v security | head -n 1)
mirror=${DEBIAN_MIRROR:-$here}
tree=$PWD/${BUILD:-build}/server-tree

mkdir -p "$tree"
exec 9>"$tree.lock"
flock 9

# Made by another version of this script, or for another page, it is made again.
recipe=$(cat server/packaging/tree.sh - <<<"$*" | cksum)
[ "$(cat "$tree/.complete" 2>/dev/null)" != "$recipe" ] || exit 0

rm -rf "$tree"
mkdir "$tree"
mmdebstrap --quiet --variant=minbase --include="systemd-sysv,dbus,${1// /,}" bookworm "$tree" "$mirror"

# The way to the package index is this machine's: its names, and the authorities that it believes.
cp -L /etc/resolv.conf /etc/hosts "$tree/etc/"
certificates=/etc/ssl/certs/ca-certificates.crt
if [ -e $certificates ]; then
    mkdir -p "$tree/etc/ssl/certs"
    cp -L $certificates "$tree$certificates"
fi
# Everything that is mounted or started ends with the process that unshare(1) starts.
# shellcheck disable=SC2016 # expanded by the shell that is started
unshare --mount --pid --fork --kill-child bash -c '
    set -eu
    mount --rbind /dev "$1/dev"
    mount -t proc proc "$1/proc"
    certificates=/etc/ssl/certs/ca-certificates.crt
    chroot "$1" /usr/bin/env -i HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 \
        ${https_proxy:+https_proxy="$https_proxy"} PIP_CERT=$certificates SSL_CERT_FILE=$certificates \
        PIP_DISABLE_PIP_VERSION_CHECK=1 bash -euc "
            python3 -m venv /opt/caramel
            /opt/caramel/bin/pip install --quiet $2
            # The device of the trials; its modules are those of this checkout.
            python3 -m venv /opt/device
            /opt/device/bin/pip install --quiet cryptography fasteners pyOpenSSL urllib3
        "
' bash "$tree" "$2"
printf '127.0.0.1 localhost ca.example.com\n' >"$tree/etc/hosts"
program=$tree/usr/local/bin/caramel-embedded
printf '#!/bin/sh\nPYTHONPATH=/project exec /opt/device/bin/python -m caramel_embedded "$@"\n' >"$program"
chmod 755 "$program"
echo "$recipe" >"$tree/.complete"
