# SPDX-License-Identifier: MIT OR Apache-2.0
"""The shortest urllib3 request that does what an unchanged check does: the floor that the benchmark compares
with."""

import ssl
import sys

import urllib3  # type: ignore[import-not-found, unused-ignore]  # has an environment of its own

url, ca, identity, since = sys.argv[1:]
tls = ssl.create_default_context(cafile=ca)
if identity:
    tls.load_cert_chain(identity)
answer = urllib3.PoolManager(ssl_context=tls).request("GET", url, headers={"If-Modified-Since": since})
print(answer.status, len(answer.data))
