# SPDX-License-Identifier: MIT OR Apache-2.0
"""The CA's life: how it is made, renewed, put under another one, and followed by the next.

One CA follows another in stages, each of which lasts as long as the maker needs:

    next      `ca-next` (or `ca-request` and `ca-install`): the next CA is there, and handed out beside the present
              one
    switched  `ca-next --switch`: it signs devices. Devices that know only the old one go on, because each
              certificate comes with the new key's certificate by the old one, *new with old* of RFC 4210, 4.4. The
              front stays with the old CA, and comes with *old with new* for devices that know only the new one
    finished  `ca-next --finish`: the front follows, and nothing hangs on the old CA any more

Each stage begins when one file gets its name: `next.crt`, `ca.crt`, and `old.crt` when it loses it. A command that is
killed before has changed nothing that counts, one that is killed after it has done all that counts; the next command
takes away what it left.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from sqlalchemy import Connection

from . import store
from .ca import (
    PEM,
    CertificateAuthority,
    Certificates,
    Chain,
    Key,
    ca_extensions,
    chain_pem,
    describe,
    end_of,
    is_self_signed,
    key_pem,
    new_key,
    utc,
)
from .errors import WrongUsage
from .shown import is_hidden, shown
from .whole_file import flush, write_whole

#: Which part of a CA's life is left when a stage should begin: two years, one year and ten weeks of twenty years.
NEXT, SWITCH, FINISH = 10, 20, 100


def name_from(text: str) -> x509.Name:
    """A name from `C=SE,O=Example AB,CN=Example CA`, in that order. Raises WrongUsage."""
    try:
        # RFC 4514 writes names the other way round.
        name = x509.Name(reversed(list(x509.Name.from_rfc4514_string(text))))
        if not list(name):
            raise ValueError("it is empty")
        hidden = [one for part in name for one in str(part.value) if is_hidden(one)]
        if hidden:
            raise ValueError(f"it has '{shown(hidden[0])}', which can't be seen")
        return name
    except ValueError as error:
        raise WrongUsage(f"{text!r} is no name like C=SE,O=Example,CN=Example CA: {error}") from None


def calendar(certificates: Certificates) -> list[tuple[int, str]]:
    """What has to be done for the CA, and at the latest when. Raises WrongUsage where there is none."""
    known = certificates.known()
    ending = known.old or known.chain
    end, begin = end_of(ending), int(ending[0].not_valid_before_utc.timestamp())
    life = end - begin
    if known.old:
        return [(end - life // FINISH, "ca-next --finish, when no device knows the old CA only")]
    if known.next:
        return [(end - life // SWITCH, "ca-next --switch, when the next CA is in the firmware")]
    if not is_self_signed(known.chain[0]):
        return [(end - life // NEXT, "ca-request and ca-install, before the intermediate or one above it ends")]
    if end <= store.now():
        # Those who know it know the renewed one: it has the same key and name.
        return [(end, "ca-renew, and a firmware that has the renewed certificate")]
    return [(end - life // NEXT, "ca-next, and a firmware that knows both")]


class Rollover:
    """What changes the CA in its folder. The methods raise WrongUsage, and have then changed nothing that counts."""

    def __init__(self, ca: CertificateAuthority, who: str) -> None:
        self._ca = ca
        self._folder = ca.folder
        self._who = who

    @contextmanager
    def changing(self, database: store.Store) -> Iterator[Connection]:
        """A transaction for one of the methods. It is over before what the command leaves behind is taken away: where
        it is killed in between, the decision is in the log, at worst twice.
        """
        self._folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        if any(self._left()):
            with database.writing() as db:
                self._log(db, "ca-settled", self._ca.chain_in("ca.crt"))
            self._settle()
        with database.writing() as db:
            yield db
        self._settle()

    # --- Stages ---

    def create(self, db: Connection, subject: str, key_type: str, days: int, replace: bool = False) -> None:
        """A new key and a certificate signed with it, at once. The CA before it is kept beside it."""
        if self._there("ca.crt") and not replace:
            raise WrongUsage(f"{self._folder}/ca.crt exists: --replace puts another CA in its place")
        self._nothing_under_way()
        name = name_from(subject)
        key = new_key(key_type)
        chain = (self._certificate(db, key, name, key, name, days),)
        self._write_key("next.key", key)
        self._replace(chain)
        self._log(db, "ca-created", chain)

    def renew(self, db: Connection, days: int) -> None:
        """The same key and name, a later end: whoever trusts the old certificate trusts what this one signs."""
        present = self._ca.known().chain[0]
        if not is_self_signed(present):
            raise WrongUsage("this CA is another one's intermediate: use ca-request and ca-install")
        key = self._ca.key_of(present)
        chain = (self._certificate(db, key, present.subject, key, present.subject, days),)
        self._write("ca.crt", chain)
        self._log(db, "ca-renewed", chain)

    def next(self, db: Connection, key_type: str, days: int) -> None:
        """The CA that will follow: another key, the same name (a longer path than the old CA allows would have to be
        counted otherwise: RFC 5280, 6.1.4 (l)).
        """
        present = self._ca.known().chain[0]
        self._nothing_under_way()
        if not is_self_signed(present):
            raise WrongUsage("this CA is another one's intermediate: use ca-request --replace and ca-install")
        if end_of([present]) <= store.now():
            raise WrongUsage("this CA has ended, and nobody believes it about the next one: ca-renew comes first")
        old, new, name = self._ca.key_of(present), new_key(key_type), present.subject
        chain = (self._certificate(db, new, name, new, name, days),)
        until = min(end_of([present]), end_of(chain))
        self._write_key("next.key", new)
        cross = [self._certificate(db, key, name, by, name, until=until) for key, by in ((new, old), (old, new))]
        self._write("cross.crt", tuple(cross))
        self._write("next.crt", chain)
        self._log(db, "ca-next", chain)

    def switch(self, db: Connection) -> None:
        """The next CA signs from now on."""
        known = self._ca.known()
        if known.old:
            raise WrongUsage("the next CA signs already: ca-next --finish ends it")
        if not known.next:
            raise WrongUsage("there is no next CA: ca-next makes one")
        self._ca.key_of(known.next[0])
        end, begin = end_of(known.next), max(one.not_valid_before_utc for one in known.next)
        if end <= store.now():
            raise WrongUsage(
                f"the next CA has ended, on {utc(end):%F}: remove {self._folder}/next.crt, and ca-next makes another"
            )
        if begin > utc(store.now()):
            raise WrongUsage(f"the next CA begins on {begin:%F %R} UTC only, and could sign nothing until then")
        self._write_key("old.key", self._ca.key_of(known.chain[0]))
        self._write("old.crt", known.chain)
        self._write("ca.crt", known.next)
        self._log(db, "ca-switched", known.next)

    def finish(self, db: Connection) -> None:
        """Nothing is signed by the old CA any more, and nobody is told of it."""
        old = self._ca.known().old
        if not old:
            raise WrongUsage("no CA follows another now")
        kept = self._folder / f"ca.{old[0].serial_number:x}.crt"
        self._write_key(f"{kept.stem}.key", self._ca.key_of(old[0]))
        os.replace(self._folder / "old.crt", kept)
        flush(self._folder)
        self._log(db, "ca-finished", old)

    # --- Under somebody else's CA ---

    def request(self, subject: str, key_type: str, replace: bool = False) -> bytes:
        """A request for somebody else's CA to sign, for the key that is there, or (`replace`, or where there is
        none) for a new one. The CA that is there goes on until `install`. Asked again, it is for the same new key.
        """
        name = name_from(subject)
        present = self._ca.known().chain[0] if self._there("ca.crt") else None
        if present and not replace:
            key = self._ca.key_of(present)
        else:
            self._nothing_under_way()
            waiting = self._ca.key_in("request.key")
            if waiting and not _is_of_type(waiting, key_type):
                raise WrongUsage(
                    f"{self._folder}/request.key waits for ca-install, and is no {key_type}: remove it for a new one"
                )
            key = waiting or new_key(key_type)
            if not waiting:
                self._write_key("request.key", key)
        builder = x509.CertificateSigningRequestBuilder(name)
        for extension, critical in ca_extensions(key.public_key()):
            builder = builder.add_extension(extension, critical)
        return builder.sign(key, hashes.SHA256()).public_bytes(PEM)

    def install(self, db: Connection, pem: bytes) -> str:
        """What somebody else's CA made of the request: our certificate, then those above it, then the root.

        It signs at once where devices know the root already, else it is the next CA. Which of them, in words.
        """
        chain = _judged(pem)
        own = chain[0].public_key()
        present = self._ca.known().chain if self._there("ca.crt") else ()
        self._ca.key_of(chain[0])
        if present and present[-1].public_key() != chain[-1].public_key():
            if present[0].public_key() == own:
                raise WrongUsage("another root, and the same key: ca-request --replace makes a new one")
            following = self._ca.known().next
            if not following or following[0].public_key() != own:
                self._nothing_under_way()
            self._write("next.crt", chain)
            self._log(db, "ca-next", chain)
            return "it has another root: it is the next CA, and signs after ca-next --switch"
        if present and present[0].public_key() != own:
            self._nothing_under_way()
        self._replace(chain)
        self._log(db, "ca-installed", chain)
        return "it signs from now on"

    # --- Files ---

    def _left(self) -> Iterator[tuple[str, str | None]]:
        """What a command has left that was killed, or that is done with: a file, and which name it should have."""
        for name, wanted in (("next", "ca"), ("request", "ca"), ("request", "next")):
            chain, key = self._ca.chain_in(f"{wanted}.crt"), self._ca.key_in(f"{name}.key")
            if chain and key and key.public_key() == chain[0].public_key():
                yield f"{name}.key", f"{wanted}.key"
        if self._same("ca.crt", "next.crt"):
            yield "next.crt", None
        if self._same("ca.crt", "old.crt"):
            yield "old.crt", None
        if self._there("old.key") and not self._there("old.crt"):
            yield "old.key", None
        if self._there("cross.crt") and not self._there("next.crt") and not self._there("old.crt"):
            yield "cross.crt", None

    def _settle(self) -> None:
        while left := next(self._left(), None):
            name, wanted = left
            if wanted:
                os.replace(self._folder / name, self._folder / wanted)
            else:
                (self._folder / name).unlink()
            flush(self._folder)

    def _replace(self, chain: Chain) -> None:
        """The CA with this chain signs from now on; the one before, if it had another key, is kept by its number."""
        before = self._ca.chain_in("ca.crt")
        if before and before[0].public_key() != chain[0].public_key():
            kept = f"ca.{before[0].serial_number:x}"
            self._write_key(f"{kept}.key", self._ca.key_of(before[0]))
            self._write(f"{kept}.crt", before)
        self._write("ca.crt", chain)

    def _nothing_under_way(self) -> None:
        if self._there("next.crt") or self._there("old.crt"):
            raise WrongUsage("one CA follows another now: ca-next --switch and --finish end it")

    def _there(self, name: str) -> bool:
        return (self._folder / name).exists()

    def _same(self, *names: str) -> bool:
        """Whether these files are there, and have the same CA's certificate."""
        chains = [self._ca.chain_in(name) for name in names]
        return all(chains) and len({describe(chain[0]) for chain in chains}) == 1

    def _write(self, name: str, chain: Chain) -> None:
        write_whole(self._folder / name, chain_pem(chain), 0o644)

    def _write_key(self, name: str, key: Key) -> None:
        write_whole(self._folder / name, key_pem(key), 0o600)

    def _certificate(
        self,
        db: Connection,
        key: Key,
        name: x509.Name,
        by: Key,
        issuer: x509.Name,
        days: int = 0,
        until: int | None = None,
    ) -> x509.Certificate:
        now = store.now()
        builder = (
            x509.CertificateBuilder(issuer, name, key.public_key(), store.next_serial(db))
            .not_valid_before(utc(now - self._ca.settings.backdate_seconds))
            .not_valid_after(utc(until or now + days * 86400))
        )
        for extension, critical in ca_extensions(key.public_key()):
            builder = builder.add_extension(extension, critical)
        if by is not key:
            identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(by.public_key())
            builder = builder.add_extension(identifier, False)
        return builder.sign(by, hashes.SHA256())

    def _log(self, db: Connection, action: str, chain: Chain) -> None:
        store.write_log(db, self._who, action, detail=describe(chain[0]))


def _is_of_type(key: Key, key_type: str) -> bool:
    return key_type == ("ec-p256" if key.key_size == 256 else f"rsa-{key.key_size}")


def _judged(pem: bytes) -> Chain:
    """A chain from a CA's certificate to its root, of which each may sign the one below it now. Raises WrongUsage."""
    try:
        chain = tuple(x509.load_pem_x509_certificates(pem))
        for below, (lower, upper) in enumerate(zip(chain, [*chain[1:], chain[-1]], strict=True)):
            lower.verify_directly_issued_by(upper)
            _judge(lower, below)
    except WrongUsage:
        raise
    except Exception as error:  # cryptography's InvalidSignature is no ValueError
        raise WrongUsage(f"no chain from our certificate to its root: {error or 'a bad signature'}") from None
    return chain


def _judge(certificate: x509.Certificate, below: int) -> None:
    """`below`: how many CAs stand below it in the chain."""
    name = certificate.subject.rfc4514_string()
    found = {type(one.value): one.value for one in certificate.extensions}
    constraints, usage = found.get(x509.BasicConstraints), found.get(x509.KeyUsage)
    if not isinstance(constraints, x509.BasicConstraints) or not constraints.ca:
        raise WrongUsage(f"{name} is no CA: basicConstraints don't say so")
    if isinstance(usage, x509.KeyUsage) and not usage.key_cert_sign:
        raise WrongUsage(f"{name} is no CA: its key usage is not to sign certificates")
    if constraints.path_length is not None and constraints.path_length < below:
        raise WrongUsage(f"{name} allows {constraints.path_length} CAs below it, and there are {below}")
    now = utc(store.now())
    if certificate.not_valid_after_utc <= now:
        raise WrongUsage(f"{name} has ended, on {certificate.not_valid_after_utc:%F}")
    if certificate.not_valid_before_utc > now:
        raise WrongUsage(f"{name} begins on {certificate.not_valid_before_utc:%F} only")
