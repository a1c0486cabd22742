"""What Caramel and what stands in front of it say, word for word, for servers that are `Scripted`.

`test_answers.py` holds these words against the real server.
"""

from __future__ import annotations

import json

from world import answer


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
