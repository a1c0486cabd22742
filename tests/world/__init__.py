"""The world around a device: a certificate authority, a Caramel server, what stands in front of it, and the
device.

Everything here is the real thing (the Caramel server, nginx, the installed command) or, where no real
server gives a certain answer, a server that says word for word what the test wrote down. Nothing of the
program under test is imported, and nothing here knows what the program ought to do.

Every server lives as long as its `with` block, listens on a free port of the loopback interface, keeps its
files in the folder it was given, and dies with the process that started it, however that one ends. Times
are aware `datetime`s in UTC, durations are seconds unless a name says otherwise.
"""

from __future__ import annotations

from world.answers import Answer, HttpRequest, answer
from world.apache import Apache
from world.authority import (
    ATTRIBUTES,
    CLIENT_AUTH,
    CODE_SIGNING,
    SERVER_AUTH,
    SUBJECT,
    Authority,
    Moment,
    PrivateKey,
    Subject,
    hours,
    key_file_content,
    name_of,
    new_key,
    now,
    private_pem,
    sealed,
    signing_request,
    unsealed,
)
from world.caramel import Caramel, Request
from world.chips import Between, Chip, Token, Tpm, keys_in
from world.device import Device, Run, Snapshot
from world.nginx import Nginx, any_front
from world.processes import (
    PATIENCE,
    Daemon,
    Service,
    adopt_orphans,
    die_with_parent,
    end,
    environment,
    forget_false_clocks,
    free_port,
    listens,
    strays,
    until,
)
from world.programs import (
    BUILD,
    CARAMEL,
    COMMAND,
    DEBIANS,
    OTHER_VERSIONS,
    PLAIN,
    ROOT,
    SYSTEMS,
    VERSIONS,
    WITHOUT_STARTER,
    debian,
    debian_python,
    in_tree,
    installation,
    interpreters,
    small_system,
    tree,
    trixie,
    wheel,
)
from world.scripted import Scripted, hang_up, hello_requests, reset, session_tickets, silence
from world.tls_front import Front, TlsFront
