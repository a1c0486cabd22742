#!/bin/bash
# The first hour of somebody new: `make demo` and `make test`, as an ordinary user, on a Debian that has nothing but what
# debootstrap puts there and python3, python3-venv, make and git (tests/world/tree.sh).
#
#     tests/fresh/fresh.sh [SUITE]     trixie (Debian 13) unless it is given; others: bookworm, forky
#
# Needs root and mmdebstrap(1). Its last lines are those of the tests.
set -eu

cd "$(dirname "$0")/../.."
suite=${1:-trixie}
folder=$PWD/${BUILD:-build}/fresh

fail() {
    echo "fresh: $*" >&2
    exit 1
}

# One at a time: the second would take the first one's clone away.
mkdir -p "$folder"
exec 9>"$folder/lock"
flock --nonblock 9 || fail "another one is at work in $folder"

tree=$(tests/world/tree.sh "fresh/$suite" "$suite")

# A clone, with what isn't committed yet.
home=$tree/home/somebody
rm -rf "$home"
mkdir -p "$home/caramel-embedded"
git ls-files -z --cached --others --exclude-standard | tar --null --ignore-failed-read -T - -c |
    tar -x -C "$home/caramel-embedded" --no-same-owner
chroot "$tree" chown -R somebody: /home/somebody

# Everything that is mounted or started ends with the process that unshare(1) starts.
# shellcheck disable=SC2016 # expanded by the shell that is started
exec unshare --mount --pid --fork --kill-child bash -c '
    set -eu
    tree=$1
    mount --rbind /dev "$tree/dev"
    mount --rbind /sys "$tree/sys"
    mount -t proc proc "$tree/proc"
    mount -t tmpfs -o mode=1777 tmpfs "$tree/tmp"
    certificates=/etc/ssl/certs/ca-certificates.crt
    exec chroot --userspec=somebody:somebody --groups= "$tree" /usr/bin/env -i \
        HOME=/home/somebody USER=somebody PATH=/usr/local/bin:/usr/bin:/bin LC_ALL=C.UTF-8 \
        PIP_CERT=$certificates SSL_CERT_FILE=$certificates ${https_proxy:+https_proxy="$https_proxy"} ${PYTEST:+PYTEST="$PYTEST"} \
        bash -c "cd ~/caramel-embedded && time make demo && time make test"
' bash "$tree"
