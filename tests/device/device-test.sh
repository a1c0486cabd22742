#!/bin/sh
# make device-test: makes the small Debian armhf tree, once, and hands it to device_test.py.
#
# The tree is what debootstrap(8) fetches, unpacked by this machine's own tools. No maintainer script runs, because under
# emulation that takes minutes; the only thing of theirs that is missed, compiled modules, is made here.
set -eu

cd "$(dirname "$0")/../.."
build=${BUILD:-build}/device
suite=bookworm
# This machine's own, unless another one is named. What apt fills in looks like a shell's.
# shellcheck disable=SC2016
mirror=${DEBIAN_MIRROR:-$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' | grep -v security | head -n 1)}
# The last one stands there because debootstrap doesn't follow virtual packages.
packages=busybox-static,libfaketime,python3-cryptography,python3-cffi-backend,python3-openssl,python3-urllib3,python3-fasteners
tree=$build/$suite-armhf

fail() {
    echo "make device-test: $*" >&2
    exit 1
}

[ "$(id -u)" = 0 ] || fail "has to run as root: it mounts, and changes its root folder"
for program in debootstrap qemu-arm-static unshare dpkg-deb; do
    command -v "$program" >/dev/null || fail "$program is missing: apt-get install debootstrap qemu-user-static"
done

# The kernel starts Arm programs with qemu: binfmt_misc, with the flag F, so that the interpreter needn't be in the tree.
registry=/proc/sys/fs/binfmt_misc
[ -e $registry/register ] || mount -t binfmt_misc binfmt_misc $registry || fail "the kernel has no binfmt_misc"
if [ ! -e $registry/qemu-arm ]; then
    cat /usr/lib/binfmt.d/qemu-arm.conf >$registry/register || fail "binfmt_misc doesn't take qemu-arm"
fi

# Made by another version of this script, it is made again.
recipe=$(cksum <tests/device/device-test.sh)
if [ "$(cat "$tree/.complete" 2>/dev/null)" != "$recipe" ]; then
    rm -rf "$tree" "$tree.debs"
    mkdir -p "$tree.debs"
    echo "fetching Debian $suite for armhf (once)"
    # Debootstrap checks the signature of what it downloads.
    debootstrap --arch=armhf --variant=minbase --download-only --include=$packages \
        $suite "$(realpath "$tree.debs")" "$mirror" >"$build/debootstrap.log" ||
        { tail -5 "$build/debootstrap.log" >&2; fail "debootstrap failed"; }
    mkdir -p "$tree/usr/bin" "$tree/usr/sbin" "$tree/usr/lib" "$tree/dev" "$tree/proc" "$tree/sys" "$tree/run" "$tree/tmp"
    for folder in bin sbin lib; do ln -s usr/$folder "$tree/$folder"; done
    for package in "$tree.debs"/var/cache/apt/archives/*.deb; do
        case ${package##*/} in
            # Nothing on a device needs these.
            apt_* | perl-base_* | gcc-*-base_* | debian-archive-keyring_* | tzdata_* | e2fsprogs_* | login_* | passwd_*) continue ;;
        esac
        dpkg-deb --fsys-tarfile "$package" | tar -x -C "$tree" --keep-directory-symlink --no-same-owner \
            --exclude='./usr/share/doc/*' --exclude='./usr/share/man/*' --exclude='./usr/share/locale/*'
    done
    # BusyBox for all that it can do, in front of the programs of Debian's essential packages.
    mkdir -p "$tree/var/spool/cron/crontabs" "$tree/var/lib/caramel"
    ln -sf busybox "$tree/usr/bin/sh"
    cp "$tree/usr/bin/sleep" "$tree/usr/sbin/crond"
    for applet in init mount start-stop-daemon pidof grep sed cat chmod mv sync sleep date; do
        rm -f "$tree/usr/bin/$applet" "$tree/usr/sbin/$applet"
        ln -sf busybox "$tree/usr/bin/$applet"
    done
    # Debian's BusyBox has no crond; a process of that name shows that the scripts hand over to it.
    mkdir -p "$tree/etc/init.d"
    printf '#!/bin/sh\n/usr/sbin/crond 100000 &\n' >"$tree/etc/init.d/S50crond"
    chmod 755 "$tree/etc/init.d/S50crond"
    for device in null:1:3 zero:1:5 random:1:8 urandom:1:9 console:5:1; do
        name=${device%%:*} numbers=${device#*:}
        [ -e "$tree/dev/$name" ] || mknod -m 666 "$tree/dev/$name" c "${numbers%:*}" "${numbers#*:}"
    done
    # Compiled modules are the same for all processors; this machine's Python has to be of the same version.
    version=$(cd "$tree/usr/lib" && echo python3.?*)
    if python=$(command -v "/usr/bin/$version"); then
        "$python" -m compileall -q -j 2 -s "$tree" -p / "$tree/usr/lib/$version" "$tree/usr/lib/python3" >/dev/null || true
    fi
    rm -rf "$tree.debs"
    echo "$recipe" >"$tree/.complete"
fi

tree=$(realpath "$tree")
python=$(realpath -s "${BUILD:-build}/tests/bin/python")
cd tests && exec "$python" -B -Es -m device.device_test "$tree"
