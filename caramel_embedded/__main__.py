"""Every way in, and every way out: whatever happens, one of the four exit statuses leaves the program.

Not a traceback's 1, which would read as "locked", not an option parser's 2, not the 120 of an output that can't
be flushed. Hence ``os._exit``; it also saves the orderly end of an interpreter whose memory the kernel takes back.
"""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, NoReturn, Optional

from . import signals
from .errors import EXIT_FAILED, CaramelError, lacking

if TYPE_CHECKING:
    from .log import Log

# What can steer OpenSSL or Python's ssl from outside. Whoever configured one CA trusts that one only.
STEERING = (
    "OPENSSL_CONF",
    "OPENSSL_CONF_INCLUDE",
    "OPENSSL_MODULES",
    "OPENSSL_ENGINES",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "SSLKEYLOGFILE",
)


def _open_standard_descriptors() -> bool:
    """Makes sure that 0, 1 and 2 are open, so that no file gets one of those numbers; whether 1 was."""
    output = True
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            output = output and fd != 1
            os.open("/dev/null", os.O_RDWR)  # gets the lowest free number, open(2)
    return output


def main(arguments: Optional[list[str]] = None, statuses: Optional[Mapping[int, int]] = None) -> NoReturn:
    """Runs the command with `arguments` (by default those of the process), and ends the process.

    `statuses`: others for some exit statuses, where the starter wants such as no crash and no empty interpreter has.
    """
    status = EXIT_FAILED
    words: Optional[Log] = None
    output = True
    try:
        gc.disable()  # a run is over before collecting garbage would pay
        # Standard error has one line; urllib3 warns of a clock that is behind, which is our business.
        if not sys.warnoptions:  # as of the tests, which make errors of them
            warnings.simplefilter("ignore")
        environment = dict(os.environ)  # the hook gets it as it was
        for name in STEERING:
            os.environ.pop(name, None)
        output = _open_standard_descriptors()
        from . import cli, log  # with this, anything may be lacking

        words = log.Log()
        status, text = cli.main(sys.argv[1:] if arguments is None else arguments, environment, words)
        signals.exit_at_once()
        _print(text, output)
    except BaseException as error:
        signals.exit_at_once()
        status = EXIT_FAILED
        _report(error, words, output)
    finally:
        os._exit((statuses or {}).get(status, status))


def _print(text: str, output: bool) -> None:
    if text and not output:
        raise OSError("standard output is closed")
    data = text.encode("utf-8", "backslashreplace")
    if data:
        from .log import write_patiently

        write_patiently(1, data)


def _report(error: BaseException, words: Optional[Log], output: bool) -> None:
    """One line on what went wrong. Of an error that nobody foresaw only its type and place: its text may hold
    anything, a key too."""
    if isinstance(error, (CaramelError, signals.Interrupted)):
        text = str(error)
    elif isinstance(error, OSError):
        text = "%s%s" % (error.strerror or error, ": %s" % error.filename if error.filename else "")
    elif isinstance(error, ImportError):
        text = lacking(error, str(error.name))
    elif isinstance(error, MemoryError):
        text = "out of memory"
    else:
        place, where = error.__traceback__, ""
        while place is not None:
            where = "%s:%d" % (os.path.basename(place.tb_frame.f_code.co_filename), place.tb_lineno)
            place = place.tb_next
        text = "internal error: %s at %s" % (type(error).__name__, where)
    if words is None:
        os.write(2, ("caramel-embedded: %s\n" % text).encode("utf-8", "backslashreplace"))
        return
    from .cli import failed

    _print(failed(words, text, getattr(error, "retry_after", None)), output)


if __name__ == "__main__":
    main()
