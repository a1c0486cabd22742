"""HTTP requests as a server saw them, and the answers that Caramel and what stands in front of it give, word for
word.

`test_answers.py` holds these answers against the real server.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Optional, Union


@dataclass(frozen=True)
class HttpRequest:
    """One request as a server saw it: nginx from its log, `Scripted` from the wire.

    `connection` numbers the connections; `verify` and `subject` are nginx's words about the client
    certificate. `received` and `sent` are bytes of HTTP, without TLS.
    """

    connection: int
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes = b""
    client_certificate: Optional[bytes] = None
    status: int = 0
    verify: str = ""
    subject: str = ""
    received: int = 0
    sent: int = 0
    tls: str = ""

    @property
    def user_agent(self) -> str:
        return self.headers.get("user-agent", "")

    @property
    def if_modified_since(self) -> str:
        return self.headers.get("if-modified-since", "")


#: What a script says to one request: bytes; pieces with pauses (seconds) in between; or None: the
#: connection ends.
Answer = Union[bytes, Iterable[Union[bytes, float]], None]


def answer(status: Union[int, str], body: bytes = b"", *headers: str) -> bytes:
    """An HTTP answer as a well-behaved server writes it; `headers` are lines such as "Last-Modified: ..."."""
    lines = [f"HTTP/1.1 {status}" if isinstance(status, str) else f"HTTP/1.1 {status} Scripted", *headers]
    if (
        not any(line.lower().startswith(("content-length:", "transfer-encoding:")) for line in headers)
        and status != 304
    ):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def problem(status: int, title: str, detail: object = None) -> bytes:
    """An error that the Caramel application itself answers."""
    body = json.dumps({"status": status, "title": title, "detail": detail}).encode()
    return answer(status, body, "Content-Type: application/problem+json")


def certificate(pem: bytes, *headers: str) -> bytes:
    """200 with a certificate, or with what stands in its place."""
    return answer(200, pem, "Content-Type: application/octet-stream", *headers)


def page(status: int) -> bytes:
    """An error page as proxies make them: nginx's."""
    body = f"<html>\r\n<head><title>{status}</title></head>\r\n<body>\r\n</body>\r\n</html>\r\n".encode()
    return answer(status, body, "Content-Type: text/html")


PENDING = answer(202, b'{"sha256": "", "url": ""}', "Content-Type: application/json")
UNKNOWN = problem(404, "Not Found")
REJECTED = problem(403, "Forbidden")
DUPLICATE = problem(400, "Bad Request", "duplicate request")
NOT_MODIFIED = answer(304)
