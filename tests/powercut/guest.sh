#!/bin/sh
# guest.sh FOLDER: makes the guest of `make powercut` there, once: a kernel (vmlinuz), a small Debian on an ext4 image
# (root.img), and what mounts it (initrd.img). All of it is what this machine's apt fetches, by its own configuration.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
folder=$1
suite=bookworm
# python3-cffi-backend has to be named: without recommended packages, it is missing.
packages=python3,python3-cryptography,python3-cffi-backend,python3-openssl,python3-urllib3,python3-fasteners
packages=$packages,f2fs-tools,dosfstools,exfatprogs,btrfs-progs,e2fsprogs,mtd-utils,kmod,mount,busybox-static
# The last lines: what the file systems ask for by name when they are mounted.
modules="virtio_pci virtio_blk virtio_net virtio_rng ext4
    vfat exfat f2fs btrfs overlay ubi ubifs jffs2 flash
    nls_cp437 nls_ascii nls_utf8 nls_iso8859_1
    crc32c_generic crc32c_intel crc32_generic deflate lzo zstd"

fail() {
    echo "make powercut: $*" >&2
    exit 1
}

[ "$(id -u)" = 0 ] || fail "has to run as root"
for program in qemu-system-x86_64 mmdebstrap mke2fs cpio depmod gcc make; do
    command -v "$program" >/dev/null ||
        fail "$program is missing: apt-get install qemu-system-x86 mmdebstrap e2fsprogs cpio kmod gcc make libelf1"
done

# Made by another version of this script, it is made again.
recipe=$(cat "$0" "$here/init" "$here/flash.c" | cksum)
[ "$(cat "$folder/complete" 2>/dev/null)" != "$recipe" ] || exit 0
rm -rf "$folder"
mkdir -p "$folder"
cd "$folder"
echo "making the guest (once)"

# Files, and nothing that would become this machine's kernel.
depends() {
    apt-cache depends "$1" | sed -n 's/.*Depends: \(linux-[a-z]*-[0-9][^ ]*\)$/\1/p'
}
image=$(depends linux-image-amd64)
[ -n "$image" ] || fail "apt knows no linux-image-amd64: apt-get update"
headers=linux-headers-${image#linux-image-}
# shellcheck disable=SC2046  # words
apt-get download "$image" "$headers" $(depends "$headers") >apt.log 2>&1 || fail "no kernel: $(tail -n 1 apt.log)"
for package in *.deb; do dpkg-deb -x "$package" kernel; done
version=$(ls kernel/lib/modules)

# The headers' Makefile expects them where the package would have put them.
sed -i "s|/usr/src/|$PWD/kernel/usr/src/|" "kernel/usr/src/$headers/Makefile"
mkdir flash
cp "$here/flash.c" flash/
echo 'obj-m := flash.o' >flash/Makefile
make -s -C "kernel/usr/src/$headers" "M=$PWD/flash" modules >flash.log 2>&1 || fail "no flash: $(tail -n 3 flash.log)"
install -D -m 0644 flash/flash.ko "kernel/lib/modules/$version/extra/flash.ko"
depmod -b kernel "$version"

mmdebstrap --quiet --variant=apt --include="$packages" \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' "$suite" tree >mmdebstrap.log 2>&1 ||
    fail "no Debian: $(tail -n 3 mmdebstrap.log)"
rm -rf tree/var/cache/apt/* tree/var/lib/apt/lists/*

# Prints the modules with all that they need, each after what it needs.
with_needs() {
    for name; do modprobe -d kernel -S "$version" --show-depends "$name"; done |
        sed -n 's/^insmod \([^ ]*\).*/\1/p' | awk '!seen[$0]++'
}

# shellcheck disable=SC2086  # words
with_needs $modules | while read -r path; do
    install -D -m 0644 "$path" "tree/usr/lib/modules/$version/${path#*"$version"/}"
done
cp "kernel/lib/modules/$version"/modules.builtin* "kernel/lib/modules/$version/modules.order" "tree/usr/lib/modules/$version/"
depmod -b tree "$version"

# The program isn't in the image: it comes with the start, so that another version needs no other image.
ln -s /run/program/caramel_embedded tree/usr/lib/python3/dist-packages/caramel_embedded
mkdir -p tree/data tree/store
# The host's loopback interface, as QEMU's user network shows it. There is no route to anything else.
printf '127.0.0.1 localhost\n10.0.2.2 ca.example\n' >tree/etc/hosts
echo 'hosts: files' >tree/etc/nsswitch.conf
printf 'passwd: files\ngroup: files\n' >>tree/etc/nsswitch.conf
mke2fs -q -t ext4 -O ^has_journal -d tree root.img 400M >mke2fs.log 2>&1

mkdir -p first/bin first/modules first/proc first/sys first/dev first/root
cp tree/usr/bin/busybox first/bin/
cp "$here/init" first/init
with_needs virtio_pci virtio_blk ext4 crc32c_generic | while read -r path; do
    cp "$path" first/modules/
    echo "${path##*/}" >>first/modules/order
done
(cd first && find . | cpio --quiet -o -H newc) >initrd.img
cp kernel/boot/vmlinuz-* vmlinuz
rm -rf tree kernel first flash ./*.deb
echo "$recipe" >complete
