# SPDX-License-Identifier: MIT OR Apache-2.0
"""The life of a device without Caramel, told run by run: what `make authority-demo` prints.

Once with a CA of the authority's own; then, with Debian's `pebble`, `knot` and `knot-dnsutils`, with an ACME CA. As
in `make demo`, every outcome is checked: if the story doesn't go as told, the exit status is 1.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import world
from authority_world import SUBJECT, ZONE, Front, Knot, Pebble, RegistrationAuthority, behind_tls
from demo.life import StoryBroken, Told, expect, heading, interrupted, locked, quote, say

#: What the second story needs, and Debian's package that has it.
PROGRAMS = {"pebble": "pebble", "knotd": "knot", "kdig": "knot-dnsutils", "nginx": "nginx-light"}


class Administrator:
    """Who decides, with the authority's own command."""

    def __init__(self, authority: RegistrationAuthority) -> None:
        self.authority = authority

    def does(self, *arguments: str) -> None:
        quote(shlex.join(["caramel-authority", *arguments]), "#")
        quote(self.authority.command(*arguments), "|")


def told(folder: Path, name: str, client_id: str, address: str, ca: Path, more: str = "") -> Told:
    """A device with an elliptic key, and its settings shown."""
    device = Told(folder, name, client_id, address, ca)
    device.settings.write_text(f"{device.settings.read_text()}CARAMEL_KEY_TYPE=ec-p256\n{more}")
    quote(f"cat {device.settings}", "$")
    quote(device.settings.read_text(), "|")
    return device


def own_ca(folder: Path) -> None:
    heading("FIRST STORY: the registration authority has a CA of its own. It is made by one command.")
    authority = RegistrationAuthority(folder / "authority")
    administrator = Administrator(authority)
    administrator.does("ca-create", "--subject", SUBJECT)
    with behind_tls(authority) as front:
        client_id = "fffbeec0ffee"
        heading("This is all that a device has to know: it is in its firmware.")
        device = told(folder, "device", client_id, front.address, authority.ca)
        device.runs("The device boots for the first time. It makes a key and a request, and sends the request.", 69)
        first = device.device.snapshot()
        device.runs("An hour later it asks again. Nobody has looked at the request yet.", 69)
        expect(not device.has_changed(first), "nothing is written while it waits")

        heading("The administrator looks at the requests, and authorizes this one.")
        administrator.does("list")
        administrator.does("authorize", client_id)
        device.runs("The device asks again, and has an identity. Programs on it can use the one file as it is.", 0)
        signed = device.device.snapshot()
        device.runs("From now on most runs find nothing new: the server says 304, and nothing is written.", 0)
        expect(not device.has_changed(signed), "nothing is written when nothing is new")
        expect(front.seen()[-1] == "GET 304", "the server said 304")
        with locked(device.device.key_file):
            device.runs("Another program holds the lock on the file: the run ends at once, and leaves it alone.", 1)

        heading("Is it the device that was reported stolen? Until that is known, it is suspended. Nothing is wiped.")
        administrator.does("suspend", client_id)
        device.runs("The device is told to wait, and what it has is not accepted.", 69)
        administrator.does("list")
        heading("It was another one, which is barred: no rule and no new key lets it in.")
        administrator.does("bar", "fffbeec0ffef")
        administrator.does("resume", client_id)
        device.runs("The device goes on with what it had.", 0)
        expect(not device.has_changed(signed), "the suspension cost the device nothing")

        heading("A key has leaked somewhere. From now on nothing is accepted that was signed before.")
        administrator.does("minimum-serial", "--now")
        device.runs("The device gets a new certificate when it asks, without anybody's help. The key stays.", 0)
        expect(device.has_changed(signed), "the newer certificate is in the file")

        key = device.device.block("PRIVATE KEY")
        heading("It was this device's key. The administrator rejects it.")
        administrator.does("reject", client_id)
        device.runs("The device wipes its identity, and asks with a new key for another one.", 69)
        expect(device.device.block("PRIVATE KEY") != key, "the old identity is wiped")
        heading("The device is in good hands again. The administrator authorizes the new request.")
        administrator.does("authorize", client_id)
        device.runs("The device has an identity again.", 0)

        heading("Where a person need not decide: the production line has told which devices there are.")
        administrator.does("allow", "fffbeec0ff01", "fffbeec0ff02")
        listed = told(folder, "listed", "fffbeec0ff01", front.address, authority.ca)
        listed.runs("A device from that line starts from nothing, and has its identity in its first run.", 0)

        heading("Its flash is erased in repair. Whoever repairs it says that its next key is good, once.")
        listed.device.key_file.unlink()
        administrator.does("allow", "--again", "fffbeec0ff01")
        listed.runs("The device starts from nothing, and has its identity again.", 0)

        heading("Every decision is in a log that nobody can rewrite.")
        administrator.does("log")


def acme_ca(folder: Path) -> None:
    heading("SECOND STORY: any browser is to trust the device. An ACME CA signs, the authority stands in between.")
    path = os.environ.get("PATH", "") + ":/usr/sbin"
    missing = sorted({package for program, package in PROGRAMS.items() if not shutil.which(program, path=path)})
    if missing:
        say(f"It needs programs that are not on this machine: apt-get install {' '.join(missing)}")
        raise StoryBroken("the second story could not be told")
    with Knot(folder / "knot") as knot, Pebble(folder / "pebble", knot, PEBBLE_CHAIN_LENGTH="2") as pebble:
        say(
            f"""A name server has the zone {ZONE} and takes updates that are signed with the authority's key. Pebble
            is the CA: it makes a certificate for a name only when the authority has proved, in that zone, that it is
            its own."""
        )
        authority = RegistrationAuthority(
            folder / "authority",
            f'[rules]\nzone = "{ZONE}"\n' + pebble.settings(folder) + knot.settings,
            signer="acme",
        )
        own = world.Authority(folder / "own")
        administrator = Administrator(authority)
        with (
            authority.serving(options=["--behind-proxy"]) as server,
            Front(folder / "front", own.server(), server.port) as front,
        ):
            heading("The device trusts one CA for the server, and the ACME CA's root for its own certificate.")
            client_id = f"fffbeec0ffee.{ZONE}"
            more = f"CARAMEL_IDENTITY_CA={pebble.roots}\n"
            device = told(folder, "device", client_id, front.address, own.certificate_file, more)
            device.runs(
                "The device boots for the first time. A rule admits names of this zone; the CA takes a while.", 69
            )
            heading("The authority's worker proves the name, and gets the certificate for the device's own request.")
            administrator.does("work", "--once")
            device.runs(
                "The device asks again, and has its certificate and the chain that leads to the CA's root.", 0
            )
            stored = device.device.snapshot()
            device.runs("From now on most runs find nothing new, and write nothing.", 0)
            expect(not device.has_changed(stored), "nothing is written when nothing is new")
            administrator.does("log")


def main() -> int:
    signal.signal(signal.SIGTERM, interrupted)
    signal.signal(signal.SIGHUP, interrupted)
    say("Lines with $ are run on the device, lines with # by the authority's administrator.")
    say("What they print stands behind |.")
    with tempfile.TemporaryDirectory(prefix="caramel-authority-demo-") as folder:
        try:
            for story in (own_ca, acme_ca):
                own = Path(folder) / story.__name__
                own.mkdir()
                story(own)
        except StoryBroken as error:
            print(f"\nThe story doesn't go as told: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print()
            return 130
    heading("That was it: all of it is taken down again.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
