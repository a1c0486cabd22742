"""A device, and a server that says to it what a test wrote down."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Optional, Union, cast

import world
from world import PLAIN, Answer, Authority, Device, HttpRequest, Run, Scripted, answers, hours, now

ID = "fffbeec0ffee"
#: What a server says to a request that it hasn't seen yet.
FIRST_TIME = (answers.UNKNOWN, answers.PENDING, answers.PENDING)
#: Making a key takes a quarter of a second, and these are no secrets.
key = functools.cache(world.new_key)


@functools.cache
def server_of(authority: Authority) -> Path:
    """Certificate and key of the server that the scripts play."""
    return authority.server(file="talking.pem")


class Talking(Device):
    """A device of this authority. In each run (`hears`) a server answers it that says what the test wrote down, and
    asks for a client certificate.

    `asked` and `connections` are what the server has seen of the last run.
    """

    def __init__(self, folder: Path, authority: Authority, client_id: str = ID) -> None:
        super().__init__(folder, None, authority.certificate_file, client_id)
        self.authority = authority
        self.asked: list[HttpRequest] = []
        self.connections = 0

    @property
    def methods(self) -> list[str]:
        return [asked.method for asked in self.asked]

    def pending(self) -> None:
        """It has sent its request in an earlier run."""
        self.has(self.authority.identity(str(self.client_id), key=key(), certified=False))

    def certified(self, **fields: Any) -> None:
        """It has a certificate, with `fields` as for `Authority.issue`: by default good for another two days."""
        fields = fields or {"not_before": now() - hours(1)}
        self.has(self.authority.identity(str(self.client_id), key=key(), **fields))

    def signed(self, **fields: Any) -> bytes:
        """A certificate for its request; `fields` as for `Authority.issue`."""
        return self.authority.sign(self.request, **{"not_before": now() - hours(1), **fields})

    def hears(
        self,
        *says: Union[Answer, Callable[[HttpRequest], Answer]],
        options: Sequence[str] = (),
        by: Optional[Path] = None,
        server: Mapping[str, Any] = MappingProxyType({}),
        **how: Any,
    ) -> Run:
        """One run against a server that gives these answers in turn; one that is missing fails the test. Or a
        function gives all of them.

        `by` has the server's certificate and key, `server` is for `Scripted`, and `how` for `Device.run`.
        """
        surplus: list[HttpRequest] = []

        def answered(asked: HttpRequest) -> Answer:
            if says and callable(says[0]):
                return says[0](asked)
            if len(asking.requests) <= len(says):
                return cast(Answer, says[len(asking.requests) - 1])
            surplus.append(asked)
            return None

        with Scripted(by or server_of(self.authority), answered, **{"client_ca": self.ca, **server}) as asking:
            self.server = asking.address
            run = self.run(*options, **how)
        self.asked, self.connections = asking.requests, asking.connections
        assert not surplus, f"asked too often: {surplus}"
        return run

    def keeps(self, *says: Union[Answer, Callable[[HttpRequest], Answer]], status: int = 127, **how: Any) -> Run:
        """One run that ends with this status and one line, and leaves the key file as it was."""
        before = self.snapshot()
        run = self.hears(*says, **how)
        assert (run.status, run.out, run.err.count("\n")) == (status, "", 1), run
        assert self.snapshot() == before
        return run

    def enrolls(self, *options: str, **how: Any) -> Run:
        """Its first run, in which it sends its request."""
        run = self.hears(*FIRST_TIME, options=options, **how)
        assert run.status == 69, run.err
        return run

    def changed(self, lines: str) -> None:
        """From now on its program is one in which these lines of Python have changed something."""
        code = f"import sys\n{lines}\nfrom caramel_embedded.__main__ import main\nmain(sys.argv[1:])\n"
        self.command = [str(Path(PLAIN).with_name("python")), "-I", "-B", "-c", code]
