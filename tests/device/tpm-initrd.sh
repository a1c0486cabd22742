#!/bin/sh
# tpm-initrd.sh TREE FILE: makes the initial RAM file system of `make device-test-tpm`, with the modules of the kernel that
# is in the tree.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
tree=$1 file=$2
version=$(ls "$tree/usr/lib/modules")
folder=$file.tree
mkdir -p "$folder/bin" "$folder/modules"
cd "$folder"
mkdir proc sys dev root tree firmware upper
cp "$tree/usr/bin/busybox" bin/
cp "$here/tpm-init" init
cp "$here/../powercut/load.py" load.py
for name in virtio_pci virtio_blk virtio_net virtio_rng ext4 crc32c_generic 9p 9pnet_virtio overlay; do
    modprobe -d "$tree" -S "$version" --show-depends "$name"
done | sed -n 's/^insmod \([^ ]*\).*/\1/p' | awk '!seen[$0]++' | while read -r path; do
    name=${path##*/}
    case $name in
        *.xz) name=${name%.xz}; xz -dc "$path" >"modules/$name" ;;
        *) cp "$path" modules/ ;;
    esac
    echo "$name" >>modules/order
done
find . | cpio --quiet -o -H newc >"$file"
