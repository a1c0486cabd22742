#!/bin/sh
# small.sh ROOT: copies into ROOT what the program needs of the Debian that this runs on: the files of some packages, without
# documentation, and the standard library without what no run imports. Prints what that takes.
set -eu
root=$1

mkdir -p "$root/etc"
for folder in bin sbin lib lib64; do
    mkdir -p "$root/usr/$folder"
    [ -e "$root/$folder" ] || ln -s "usr/$folder" "$root/$folder"
done

packages='libc6 libgcc-s1 libssl3 zlib1g libexpat1 libffi8 python3.11-minimal libpython3.11-minimal libpython3.11-stdlib
    python3-minimal python3-cryptography python3-cffi-backend python3-openssl python3-urllib3 python3-fasteners
    python3-monotonic python3-six busybox-static'
for package in $packages; do
    dpkg -L "$package" || dpkg -L "$package:$(dpkg --print-architecture)"
done | sort -u | while read -r path; do
    case $path in
        # What Debian says of the licences goes along.
        /usr/share/doc/*/copyright) ;;
        /usr/bin/py3* | /usr/share/* | /etc/* | /usr/lib/*/gconv/* | /usr/lib/*/engines-3/*) continue ;;
        */pydoc_data/* | */unittest/* | */idlelib/* | */turtle.py | */config-3.11-*/* | */test/* | */tests/*) continue ;;
        */asyncio/* | */curses/* | */dbm/* | */sqlite3/* | */wsgiref/* | */xmlrpc/* | */multiprocessing/*) continue ;;
    esac
    [ -d "$path" ] || printf '%s\n' "$path"
done | tar -c -T - | tar -x -C "$root" --keep-directory-symlink

ln -s busybox "$root/usr/bin/sh"
python3 -m compileall -q --invalidation-mode unchecked-hash -s "$root" -p / "$root/usr/lib"
printf 'root:x:0:0::/:/usr/bin/sh\ncaramel:x:1000:1000::/data:/usr/bin/sh\n' >"$root/etc/passwd"
printf 'root:x:0:\ncaramel:x:1000:\n' >"$root/etc/group"
du -sh "$root"
