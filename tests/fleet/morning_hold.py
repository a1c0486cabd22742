# SPDX-License-Identifier: MIT OR Apache-2.0
"""A WSGI filter that makes a server slow: one request at a time, and each takes at least so long.

Runs in the server's own Python. With it two thousand devices are as much for the server as a hundred times as many
would be for a quick one, and the machine can spare what the devices themselves cost.
"""

import threading
import time


def make_filter(app, global_conf, seconds="0.1"):  # type: ignore[no-untyped-def]
    """What the INI file names as `paste.filter_app_factory`; `seconds` that each request takes."""
    turn = threading.Lock()

    def held(environ, start_response):  # type: ignore[no-untyped-def]
        with turn:
            over = time.monotonic() + float(seconds)
            parts = list(app(environ, start_response))
            time.sleep(max(0.0, over - time.monotonic()))
            return parts

    return held
