# SPDX-License-Identifier: MIT OR Apache-2.0
"""The talk with the ACME CA (RFC 8555): account, order, `dns-01`, certificate, renewal information (RFC 9773).

The `acme` package speaks the protocol. Here is what has to survive this process: an order is known by what
`new_order` returned, and `collect` goes on with it wherever it was left, so that whoever resumes it gets the same
certificate. And here every answer of the CA's, expected or not, becomes one of the exceptions below, each of them for
what is to be done about it.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import josepy
import requests
import urllib3
from acme import challenges, client, errors, messages
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import verification
from cryptography.x509.oid import ExtendedKeyUsageOID
from werkzeug.http import parse_date

from . import __version__
from .ca import PEM, USAGES, key_pem, new_key
from .configuration import Acme
from .errors import TryLater, WrongUsage
from .registry import Issued
from .zone import Zone

MINUTE, HOUR, DAY = 60, 3600, 86400
#: Seconds and bytes that one answer of the CA may take.
PATIENCE, LONGEST = 20, 1 << 20
#: How often one request is said again with a new nonce: RFC 8555, 6.5, wants that, and some CAs see to it.
NONCES = 5
#: How often an order of which the CA knows nothing, or nothing that makes sense, is asked about before another one is
#: made. A CA of several machines may forget for a while what it has just written.
DOUBTS = 5


class OrderLost(Exception):
    """The CA gave up on the order: the next try has to begin with a new one."""


class NotValidated(OrderLost):
    """The CA looked at the zone, and didn't find what it wanted. CAs count how often that happens in an hour."""


class Doubtful(TryLater):
    """The CA's answer can't be its last word: it is asked again about the same order. See `doubted`."""


class Limited(TryLater):
    """The CA has a limit: for this name, else for all orders like this one."""

    def __init__(self, text: str, seconds: int, one_name: bool) -> None:
        super().__init__(text, seconds)
        self.one_name = one_name


class CaAway(TryLater):
    """The CA can't be talked to: no order gets on."""


class _NewOrder(messages.NewOrder):
    """With what the package doesn't know: RFC 9773, 5."""

    replaces: str | None = josepy.json_util.field("replaces", omitempty=True)


class Whole(requests.adapters.HTTPAdapter):
    """Answers that come whole, in time, and of a size.

    The package's time limit is one for each read: a CA, or a proxy before it, that sends a byte now and then would
    hold a worker for ever.
    """

    def __init__(self) -> None:
        super().__init__()
        self._end: float | None = None
        self._worker = threading.get_ident()
        signal.signal(signal.SIGUSR1, self._over)

    def send(self, *arguments: Any, **options: Any) -> requests.Response:
        self._end = time.monotonic() + PATIENCE
        timer = threading.Timer(PATIENCE, signal.pthread_kill, [self._worker, signal.SIGUSR1])
        timer.daemon = True
        timer.start()
        try:
            answer = super().send(*arguments, **options)
            content = answer.raw.read(LONGEST + 1, decode_content=True)
        except urllib3.exceptions.HTTPError as error:
            raise requests.ConnectionError(error) from None
        finally:
            self._end = None
            timer.cancel()
        if len(content) > LONGEST:
            answer.close()
            raise requests.ConnectionError(f"an answer of more than {LONGEST} bytes")
        answer.raw = io.BytesIO(content)
        return answer

    def _over(self, *_: object) -> None:
        if self._end is not None and time.monotonic() >= self._end:
            raise requests.Timeout(f"no whole answer within {PATIENCE} s")


class _Network(client.ClientNetwork):
    """Says a request again when the CA doesn't like the nonce, and keeps the last answer: errors don't have it."""

    last: requests.Response | None = None

    def post(self, *arguments: Any, **options: Any) -> requests.Response:
        for left in reversed(range(NONCES)):
            try:
                return super().post(*arguments, **options)
            except messages.Error as error:
                if error.code != "badNonce" or not left:
                    raise
        raise AssertionError

    def note(self, response: requests.Response, *_: Any, **__: Any) -> None:
        self.last = response


class _Client(client.ClientV2):
    @classmethod
    def retry_after(cls, response: requests.Response, default: int) -> datetime.datetime:
        """The package takes dates, which are UTC (RFC 9110, 5.6.7), for local time, and fails at large numbers."""
        return datetime.datetime.now() + datetime.timedelta(seconds=_retry_after(response, default, 1, DAY))


class AcmeCa:
    def __init__(self, settings: Acme, zone: Zone) -> None:
        self._settings = settings
        self._zone = zone
        self._client: client.ClientV2 | None = None
        self._answer_of: _Network | None = None
        try:
            read = "roots"
            self._roots()
            read = "account_key"
            self._key = self._account_key(Path(settings.account_key))
            read = "eab_key_file"
            self._binding = settings.eab_key_file and Path(settings.eab_key_file).read_text().strip()
            if settings.eab_key_file and not josepy.b64.b64decode(self._binding):
                raise ValueError(f"{settings.eab_key_file} is empty")
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise WrongUsage(f"acme.{read}: {error}") from None

    # --- What the worker does. All of it raises TryLater, and where it is about an order, OrderLost ---

    def new_order(self, name: str, replaced: str | None) -> str:
        """Asks for an order for this name, in the place of the certificate `replaced`; what it is called from now on.

        CAs don't count such an order against their limits (RFC 9773, 5).
        """
        with self._trouble(name) as acme:
            known = "renewalInfo" in acme.directory.to_partial_json()
            replaces = _certificate_id(replaced) if replaced and known else None
            wanted = _NewOrder(identifiers=[messages.Identifier(typ=messages.IDENTIFIER_FQDN, value=name)])
            try:
                answer = self._post(acme, acme.directory["newOrder"], wanted.update(replaces=replaces))
            except (errors.ConflictError, messages.Error) as error:
                # The CA doesn't know that certificate, or has an order in its place already.
                if not replaces or getattr(error, "code", None) in ("rateLimited", "accountDoesNotExist"):
                    raise
                answer = self._post(acme, acme.directory["newOrder"], wanted)
            order = messages.Order.from_json(answer.json())
            if not (order.authorizations and order.finalize):
                raise Doubtful("the ACME CA: no order came back")
            return _resource(answer.headers["Location"], order)

    def find_order(self, name: str, seconds: float) -> str | None:
        """The order that was asked for this name and whose answer nobody wrote down, where the CA lists orders.

        RFC 8555, 7.1.2.1. Those that don't, such as Let's Encrypt, give a pending order once more to whoever asks
        again.
        """
        with self._trouble(name) as acme:
            assert acme.net.account
            page = self._post(acme, acme.net.account.uri).json().get("orders")
            end = time.monotonic() + seconds
            while page and time.monotonic() < end:
                answer = self._post(acme, page)
                for uri in answer.json().get("orders", []):
                    order = messages.Order.from_json(self._post(acme, uri).json())
                    begun = order.status in (messages.STATUS_PENDING, messages.STATUS_READY)
                    if begun and [one.value for one in order.identifiers] == [name]:
                        return _resource(uri, order)
                page = answer.links.get("next", {}).get("url")
            return None

    def collect(self, resource: str, name: str, csr_pem: str, seconds: float) -> Issued:
        """Brings the order to its end: answers what is still asked, finalizes unless that is done, gets the
        certificate.
        """
        known = json.loads(resource)
        order = messages.OrderResource(
            uri=known["uri"],
            body=messages.Order(authorizations=known["authorizations"], finalize=known["finalize"]),
            csr_pem=csr_pem.encode(),
        )
        # The package counts in local time without a zone.
        deadline = datetime.datetime.now() + datetime.timedelta(seconds=seconds)
        with self._trouble(name, known["uri"]) as acme, contextlib.ExitStack() as published:
            for uri in order.body.authorizations:
                one, _ = acme.poll(messages.AuthorizationResource(uri=uri, body=messages.Authorization()))
                if one.body.identifier.value != name:
                    raise Doubtful(f"the ACME CA: an authorization for {one.body.identifier.value}")
                if one.body.status == messages.STATUS_PENDING:
                    self._answer(acme, one, published, seconds / 2)
                else:  # a worker that died after it was validated has left its answer there
                    self._zone.clear(challenges.DNS01.LABEL + "." + name)
            order = acme.poll_authorizations(order, deadline)
            order = acme.poll_finalization(order, deadline, fetch_alternative_chains=True)
            chains = [order.fullchain_pem, *order.alternative_fullchains_pem]
            return self._issued(
                acme, [x509.load_pem_x509_certificates(pem.encode()) for pem in chains], name, csr_pem
            )

    def renewal(self, pem: str) -> tuple[int | None, int]:
        """When the CA wants this certificate to be renewed (None: it doesn't say), and when to ask again.

        Never later than when a third of its life is left. Whatever makes no sense is Doubtful.
        """
        with self._trouble() as acme:
            base, certificate_id = acme.directory.to_partial_json().get("renewalInfo"), _certificate_id(pem)
            if not base or not certificate_id:
                return None, int(time.time()) + DAY
            leaf = x509.load_pem_x509_certificate(pem.encode())
            answer = acme.net.get(f"{base}/{certificate_id}")
            window = messages.RenewalInfo.from_json(answer.json()).suggested_window
            start, end = window.start.timestamp(), window.end.timestamp()
            # "At once" is a window that has just ended; one long before the certificate would be at once for ever.
            if end < max(start, leaf.not_valid_before_utc.timestamp() - DAY):
                raise Doubtful(f"the ACME CA: a renewal window from {window.start} to {window.end}")
            # One moment for each device, so that they don't all come at once (RFC 9773, 4.2).
            moment = random.uniform(start, end)
            return int(min(moment, _last_third(leaf))), int(time.time()) + _retry_after(answer, 6 * HOUR, MINUTE, DAY)

    # --- How ---

    def _connected(self) -> client.ClientV2:
        if self._client is None:
            self._answer_of = network = _Network(
                josepy.jwk.JWKEC(key=self._key),
                alg=josepy.jwa.ES256,
                verify_ssl=self._settings.directory_ca or True,  # type: ignore[arg-type]  # `requests` takes paths
                user_agent=f"caramel-authority/{__version__}",
                timeout=PATIENCE,
            )
            network.session.hooks["response"].append(network.note)
            network.session.mount("https://", Whole())
            acme = _Client(client.ClientV2.get_directory(self._settings.directory, network), network)
            account = messages.NewRegistration.from_data(
                email=self._settings.contact.removeprefix("mailto:") or None,
                terms_of_service_agreed=True,
                external_account_binding=messages.ExternalAccountBinding.from_data(
                    network.key.public_key(), self._settings.eab_key_id, self._binding, acme.directory
                )
                if network.key and self._binding
                else None,
            )
            try:
                made = acme.new_account(account)
                print(f"the ACME CA has a new account for us: {made.uri}", file=sys.stderr, flush=True)
            except errors.ConflictError as known:
                network.account = messages.RegistrationResource(uri=known.location, body=messages.Registration())
            self._client = acme
        return self._client

    @staticmethod
    def _post(acme: client.ClientV2, uri: str, content: Any = None) -> requests.Response:
        return acme.net.post(uri, content, new_nonce_url=acme.directory["newNonce"])

    def _answer(
        self,
        acme: client.ClientV2,
        one: messages.AuthorizationResource,
        published: contextlib.ExitStack,
        seconds: float,
    ) -> None:
        for challenge in one.body.challenges:
            if isinstance(challenge.chall, challenges.DNS01):
                response, value = challenge.chall.response_and_validation(acme.net.key)
                name = challenge.chall.validation_domain_name(one.body.identifier.value)
                published.enter_context(self._zone.challenge(name, value, seconds))
                if challenge.status == messages.STATUS_PENDING:
                    acme.answer_challenge(challenge, response)
                return
        raise OrderLost("the CA offers no dns-01 challenge")

    def _issued(self, acme: client.ClientV2, chains: list[list[x509.Certificate]], name: str, csr_pem: str) -> Issued:
        """Of the chains that the CA offers, the first that a device can follow to one of its roots, without that
        root.

        What is wrong with it by our configuration can be mended there: the order is kept, and looked at again.
        """
        leaf = chains[0][0]
        if leaf.public_key() != x509.load_pem_x509_csr(csr_pem.encode()).public_key():
            raise OrderLost("the CA's certificate is for another key")
        if leaf.not_valid_after_utc.timestamp() <= time.time():
            raise OrderLost("the CA's certificate has ended")
        missing = [usage for usage in self._settings.usages if not _is_for(leaf, usage)]
        if missing:
            raise TryLater(f"the CA's certificate is not for {missing[0]}s, which acme.usages asks for")
        chain = next(filter(None, (self._followed(leaf, one[1:], name) for one in chains)), None)
        if chain is None:
            raise TryLater("none of the CA's chains leads to the roots that the devices have")
        ask = int(time.time()) if "renewalInfo" in acme.directory.to_partial_json() else None
        text = "".join(one.public_bytes(PEM).decode() for one in chain)
        end = int(leaf.not_valid_after_utc.timestamp())
        return Issued(text, leaf.serial_number, end, _last_third(leaf), ask)

    def _followed(
        self, leaf: x509.Certificate, others: list[x509.Certificate], name: str
    ) -> list[x509.Certificate] | None:
        """The way from the leaf to what one of the roots signed, all of it good now and for the usages."""
        anything = verification.ExtensionPolicy.permit_all()
        policies = verification.PolicyBuilder().store(verification.Store(self._roots())).extension_policies(
            # The least that the package asks of policies. Devices don't compare with the web's rules either.
            ca_policy=anything.require_present(x509.BasicConstraints, verification.Criticality.AGNOSTIC, None),
            ee_policy=anything.require_present(x509.SubjectAlternativeName, verification.Criticality.AGNOSTIC, None),
        )  # fmt: skip
        # Devices don't look at the begin of their own certificate: clocks differ.
        policies = policies.time(max(datetime.datetime.now(datetime.UTC), leaf.not_valid_before_utc))
        client_verifier, server_verifier = (
            policies.build_client_verifier(),
            policies.build_server_verifier(x509.DNSName(name)),
        )
        try:
            if "client" in self._settings.usages:
                chain = client_verifier.verify(leaf, others).chain
            if "server" in self._settings.usages or "client" not in self._settings.usages:
                chain = server_verifier.verify(leaf, others)
        except verification.VerificationError:
            return None
        return chain[:-1]

    @contextlib.contextmanager
    def _trouble(self, name: str = "", order: str = "") -> Iterator[client.ClientV2]:
        """The connection. Whatever the CA answers, and whatever the package makes of it, ends as one of the
        exceptions above. `order` is the address of the order that it is about.
        """
        try:
            yield self._connected()
        except (TryLater, OrderLost):
            raise
        except Exception as error:
            raise self._sorted(error, name, order) from None

    def _sorted(self, error: Exception, name: str, order: str) -> Exception:
        """What is to be done about it."""
        answer = self._answer_of.last if self._answer_of else None
        text = f"the ACME CA: {_reason(error, answer)}"
        code = error.code if isinstance(error, messages.Error) else None
        if code == "accountDoesNotExist":
            self._client = None
            return OrderLost("the ACME CA has lost our account and its orders: it is registered again")
        if isinstance(error, (requests.ConnectionError, requests.Timeout)):
            if order and self._client and not _same_place(order, self._client):
                # The configuration had another CA when it was made, or the CA has moved: nobody will answer for it.
                return OrderLost(f"{text}: the order is not where the CA's directory is")
            answer = None
        seconds = _retry_after(answer, MINUTE, MINUTE, DAY)
        if answer is None or answer.status_code in (502, 503, 504) or self._client is None:
            self._client = None  # next time with a new connection and new nonces
            return CaAway(text, min(seconds, HOUR))
        if code == "rateLimited":
            seconds = _retry_after(answer, HOUR, MINUTE, DAY)
            # What a limit is about, is said in words only. Let's Encrypt calls an order's own names a set.
            one_name = bool(name) and (name in text or "exact set" in text)
            # If it isn't about all orders in the end: another one is tried in an hour.
            return Limited(text, seconds if one_name else min(seconds, HOUR), one_name)
        if (
            code in ("badNonce", "serverInternal")
            or answer.status_code >= 500
            or isinstance(error, errors.TimeoutError)
        ):
            return TryLater(text, seconds)
        if isinstance(error, errors.ValidationError):
            return NotValidated(text)
        refused = code not in (None, "orderNotReady") and answer.status_code != 404
        if refused or isinstance(error, errors.IssuanceError) or type(error) is errors.Error:
            return OrderLost(text)
        return Doubtful(text, seconds)

    def _roots(self) -> list[x509.Certificate]:
        """Read anew each time: where roots are added, nobody has to start anything again."""
        return x509.load_pem_x509_certificates(Path(self._settings.roots).read_bytes())

    @staticmethod
    def _account_key(path: Path) -> ec.EllipticCurvePrivateKey:
        """The account's key, made at first use; several workers that do that at once agree on one.

        Raises OSError, and ValueError, TypeError or UnsupportedAlgorithm where the file has no key of this kind.
        """
        if not path.exists():
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            temporary.touch(mode=0o600)
            temporary.write_bytes(key_pem(new_key("ec-p256")))
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
            temporary.unlink()
        key = serialization.load_pem_private_key(path.read_bytes(), None)
        if not (isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP256R1)):
            raise ValueError(f"{path} has no P-256 key")
        return key


def doubted(resource: str | None) -> str | None:
    """What an order is called after one more doubt about it; None where that was one too many."""
    order = json.loads(resource) if resource else {"doubts": DOUBTS}
    order["doubts"] = order.get("doubts", 0) + 1
    return json.dumps(order) if order["doubts"] <= DOUBTS else None


def _same_place(order: str, acme: client.ClientV2) -> bool:
    """Whether an order is on the server that makes orders now."""
    return urlsplit(order).netloc == urlsplit(str(acme.directory.to_partial_json().get("newOrder"))).netloc


def _resource(uri: str, order: messages.Order) -> str:
    return json.dumps({"uri": uri, "authorizations": order.authorizations, "finalize": order.finalize})


def _reason(error: Exception, answer: requests.Response | None) -> str:
    """In one line; there is always one."""
    if isinstance(error, errors.IssuanceError):
        error = error.error
    try:
        text = str(error)
        if isinstance(error, errors.ValidationError):
            challenged = [one for failed in error.failed_authzrs for one in failed.body.challenges]
            text = "; ".join(str(one.error) for one in challenged if one.error)
        if isinstance(error, errors.TimeoutError):
            text = "it takes too long"
    except Exception:  # the CA's problem may have anything in the place of a text
        text = ""
    named = text and isinstance(error, messages.Error) and error.detail
    kind = "" if named or (text and isinstance(error, errors.ValidationError)) else f"{type(error).__name__} "
    status = "" if named or answer is None else f" (HTTP status {answer.status_code})"
    return f"{kind}{text}{status}".strip()


def _retry_after(answer: requests.Response | None, default: int, least: int, most: int) -> int:
    """Seconds that the answer wants us to wait (RFC 9110, 10.2.3: a number, or a date), within these bounds."""
    said = answer.headers.get("Retry-After", "").strip() if answer is not None else ""
    seconds: float = default
    if said.isascii() and said.isdigit():
        seconds = int(said[:9])
    elif date := parse_date(said):
        seconds = date.timestamp() - time.time()
    return int(min(max(seconds, least), most))


def _certificate_id(pem: str) -> str | None:
    """What RFC 9773, 4.1, calls a certificate; None where it doesn't say whose key signed it."""
    leaf = x509.load_pem_x509_certificate(pem.encode())
    signers = [
        one.value.key_identifier for one in leaf.extensions if isinstance(one.value, x509.AuthorityKeyIdentifier)
    ]
    if not (signers and signers[0]):
        return None
    serial = leaf.serial_number.to_bytes(leaf.serial_number.bit_length() // 8 + 1, "big")
    return ".".join(josepy.b64.b64encode(one).decode() for one in (signers[0], serial))


def _last_third(leaf: x509.Certificate) -> int:
    """When a third of its life is left."""
    begin, end = int(leaf.not_valid_before_utc.timestamp()), int(leaf.not_valid_after_utc.timestamp())
    return end - (end - begin) // 3


def _is_for(leaf: x509.Certificate, usage: str) -> bool:
    """RFC 5280, 4.2.1.12: for everything where it doesn't say."""
    try:
        usages = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return True
    return USAGES[usage] in usages or ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE in usages
