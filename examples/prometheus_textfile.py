#!/usr/bin/env python3
"""Writes what caramel-embedded --status --json says as metrics for node_exporter's textfile collector.

prometheus_textfile.py /var/lib/node_exporter/caramel.prom [COMMAND...]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys


def quoted(text: str) -> str:
    """A label's value, as the exposition format wants it."""
    return '"%s"' % text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def metrics(status: int, output: str) -> str:
    """The metrics; of a status that couldn't be told only that."""
    lines = [
        "# HELP caramel_status What a check would say: 0 certified, 69 pending, 127 neither.",
        "# TYPE caramel_status gauge",
        f"caramel_status {status}",
    ]
    if output:
        values = json.loads(output)
        lines += [
            "# HELP caramel_info Which identity this is.",
            "# TYPE caramel_info gauge",
            "caramel_info{client_id=%s,request_sha256=%s,version=%s} 1"
            % tuple(quoted(values[name] or "") for name in ("client_id", "request_sha256", "version")),
            "# HELP caramel_hook_owed Whether the hook has still to succeed.",
            "# TYPE caramel_hook_owed gauge",
            f"caramel_hook_owed {int(values['hook_owed'])}",
        ]
        certificate = values["certificate"]
        if certificate and certificate["not_after"] is not None:
            lines += [
                "# HELP caramel_certificate_not_after_seconds When the certificate ends, in seconds since 1970.",
                "# TYPE caramel_certificate_not_after_seconds gauge",
                f"caramel_certificate_not_after_seconds {certificate['not_after']}",
            ]
    return "".join(f"{line}\n" for line in lines)


def main(path: str, *command: str) -> int:
    line = [*(command or ["caramel-embedded"]), "--status", "--json"]
    try:
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True, timeout=60)
        # The collector may read at any time: it sees the old file or the new one.
        temporary = f"{path}.{os.getpid()}"
        with open(temporary, "w") as file:
            file.write(metrics(done.returncode, done.stdout))
        os.replace(temporary, path)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"prometheus_textfile.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: prometheus_textfile.py FILE.prom [COMMAND...]")
    sys.exit(main(*sys.argv[1:]))
