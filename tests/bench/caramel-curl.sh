#!/bin/sh
# SPDX-License-Identifier: MIT OR Apache-2.0
# What a careful engineer would write instead of this project: one check with curl, openssl and flock. It is here to be
# measured against. Same combined file, same exit statuses, same environment variables; what it leaves out is listed at
# the end.
set -u
umask 077
export LC_ALL=C.UTF-8
server=$CARAMEL_CA ca=$CARAMEL_CA_CERT file=$CARAMEL_KEY_FILE cn=$CARAMEL_CN

nl='
'

fail() { echo "$cn: $*" >&2; exit 127; }

exec 9<>"$file" || exit 127
flock -n 9 || exit 1
[ "$file" -ef /proc/self/fd/9 ] || exit 1 # replaced between open and flock

request() { sed -n '/^-----BEGIN NEW CERTIFICATE REQUEST/,/^-----END/{s/ NEW / /;p}' "$file"; }
certificate() { sed -n '/^-----BEGIN CERTIFICATE-----/,/^-----END/p' "$file"; }

# store TIME: standard input becomes the file, durably, with this modification time
store() {
    cat >"$file.new" && touch -d "$1" "$file.new" && sync "$file.new" && mv "$file.new" "$file" &&
        sync "${file%/*}" || fail "can't store $file"
}

# A new key, and a request whose subject is the CA's, in the order that Caramel wants, with our name
start_over() {
    subject=
    names=$(openssl x509 -in "$ca" -noout -subject -nameopt sep_multiline,sname,utf8) || fail "can't read $ca"
    for part in C ST L O OU; do
        value=$(printf '%s\n' "$names" | sed -n "s/^ *$part *= *//p" | sed 's,[/\\],\\&,g')
        [ -z "$value" ] || subject=$subject/$part=$value
    done
    key=$(openssl genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:2048 2>/dev/null) || fail "can't make a key"
    csr=$(printf '%s\n' "$key" | openssl req -new -utf8 -key /dev/stdin -subj "$subject/CN=$cn") ||
        fail "can't make a request"
    printf '%s\n%s\n' "$key" "$(printf '%s\n' "$csr" | sed 's/ CERTIFICATE REQUEST/ NEW CERTIFICATE REQUEST/')" |
        store now
}

# ask [OPTION...]: $status and $modified of the answer, $answer its body
ask() {
    hash=$(request | sha256sum)
    hash=${hash%% *}
    answer=$(curl -sS --max-time 60 --noproxy '*' --cacert "$ca" -A "caramel-curl ($cn)" \
        -w '\n%{http_code} %header{last-modified}' "$@" "https://$server/$hash") || fail "curl: $?"
    line=${answer##*"$nl"}
    answer=${answer%"$nl"*} answer=${answer%"$nl"}
    status=${line%% *} modified=${line#* }
}

post() {
    request >"$file.csr"
    ask -H 'Content-Type: application/x-pem-file' --data-binary "@$file.csr"
    rm -f "$file.csr"
    [ "$status" = 202 ] || fail "the server refuses the request: $status"
}

grep -q '^-----BEGIN NEW CERTIFICATE REQUEST' "$file" || start_over
# A certificate that has ended must not be shown: nginx would answer 400 for ever.
if openssl x509 -in "$file" -noout -checkend 0 >/dev/null 2>&1; then
    ask --cert "$file" -z "$file"
else
    ask
fi
case $status in
304) exit 0 ;;
404)
    post
    ask
    ;;
403)
    case $answer in
    '{'*403*)
        start_over
        post
        ;;
    *) fail "403 that isn't Caramel's" ;;
    esac
    ;;
esac
case $status in
202) exit 69 ;;
304) exit 0 ;;
200) ;;
*) fail "the server answers $status" ;;
esac

[ "$answer" != "$(certificate)" ] || exit 0
printf '%s\n' "$answer" | openssl verify -CAfile "$ca" >/dev/null 2>&1 || fail "the answer isn't our CA's"
[ "$(printf '%s\n' "$answer" | openssl x509 -noout -pubkey)" = "$(openssl pkey -in "$file" -pubout)" ] ||
    fail "the answer is another key's"
[ -n "$modified" ] ||
    modified=$(printf '%s\n' "$answer" | openssl x509 -noout -startdate | sed 's/^[^=]*=//')
{
    sed -n '/^-----BEGIN PRIVATE KEY/,/^-----END/p' "$file"
    printf '%s\n' "$answer"
    sed -n '/^-----BEGIN NEW CERTIFICATE REQUEST/,/^-----END/p' "$file"
} | store "$modified"
exit 0

# Left out: a clock that is wrong, a server that refuses the certificate shown, owner and mode, the rule that a
# certificate in its last third is asked for without a condition, cloned cards, weak keys, most of what can be damaged.
