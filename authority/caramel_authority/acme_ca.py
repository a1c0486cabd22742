# SPDX-License-Identifier: MIT OR Apache-2.0
"""The talk with the ACME CA (RFC 8555): account, order, `dns-01`, certificate, renewal information (RFC 9773).

The `acme` package speaks the protocol. Here is what has to survive this process: an order is known by what
`new_order` returned, and `collect` goes on with it wherever it was left, so that whoever resumes it gets the same
certificate.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

import josepy
import requests
from acme import challenges, client, errors, messages
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization

from . import __version__
from .ca import PEM, key_pem, new_key
from .configuration import Acme
from .errors import TryLater, WrongUsage
from .registry import Issued
from .zone import Zone

#: Seconds that one answer of the CA may take.
PATIENCE = 20
#: How often one request is said again with a new nonce: RFC 8555, 6.5, wants that, and some CAs see to it.
NONCES = 5
#: Problems (RFC 8555, 6.7) that say nothing about the order: it goes on later.
PASSING = ("badNonce", "rateLimited", "serverInternal")


class OrderLost(Exception):
    """The CA gave up on the order: the next try has to begin with a new one."""


class _Network(client.ClientNetwork):
    """Says a request again when the CA doesn't like the nonce, and remembers for how long the CA wants to be left
    alone.
    """

    retry_after = 0

    def post(self, *arguments: Any, **options: Any) -> requests.Response:
        for left in reversed(range(NONCES)):
            try:
                return super().post(*arguments, **options)
            except messages.Error as error:
                if error.code != "badNonce" or not left:
                    raise
        raise AssertionError

    def note(self, response: requests.Response, *_: Any, **__: Any) -> None:
        if response.status_code in (429, 503):
            until = client.ClientV2.retry_after(response, 3600)
            self.retry_after = max(0, int(until.timestamp() - time.time()))


class AcmeCa:
    def __init__(self, settings: Acme, zone: Zone) -> None:
        self._settings = settings
        self._zone = zone
        self._client: client.ClientV2 | None = None
        try:
            self._roots = x509.load_pem_x509_certificates(Path(settings.roots).read_bytes())
            self._key = self._account_key(Path(settings.account_key))
        except (OSError, ValueError) as error:
            raise WrongUsage(f"acme: {error}") from None

    # --- What the worker does. All of it raises TryLater, and where it is about an order, OrderLost ---

    def new_order(self, csr_pem: str) -> str:
        """Asks for an order for this request's name; what it is called from now on."""
        with self._trouble():
            order = self._connected().new_order(csr_pem.encode())
            return _resource(order.uri, order.body)

    def find_order(self, name: str, seconds: float) -> str | None:
        """The order that was asked for this name and whose answer nobody wrote down, where the CA lists orders.

        RFC 8555, 7.1.2.1. Those that don't, such as Let's Encrypt, give a pending order once more to whoever asks
        again.
        """
        with self._trouble():
            acme = self._connected()

            def get(uri: str) -> requests.Response:
                return acme.net.post(uri, None, new_nonce_url=acme.directory["newNonce"])

            assert acme.net.account
            page = get(acme.net.account.uri).json().get("orders")
            end = time.monotonic() + seconds
            while page and time.monotonic() < end:
                answer = get(page)
                for uri in answer.json().get("orders", []):
                    order = messages.Order.from_json(get(uri).json())
                    begun = order.status in (messages.STATUS_PENDING, messages.STATUS_READY)
                    if begun and [one.value for one in order.identifiers] == [name]:
                        return _resource(uri, order)
                page = answer.links.get("next", {}).get("url")
            return None

    def collect(self, resource: str, csr_pem: str, seconds: float) -> Issued:
        """Brings the order to its end: answers what is still asked, finalizes unless that is done, gets the
        certificate.
        """
        order = json.loads(resource)
        order = messages.OrderResource(
            uri=order["uri"],
            body=messages.Order(authorizations=order["authorizations"], finalize=order["finalize"]),
            csr_pem=csr_pem.encode(),
        )
        # The package counts in local time without a zone.
        deadline = datetime.datetime.now() + datetime.timedelta(seconds=seconds)
        with self._trouble(), contextlib.ExitStack() as published:
            acme = self._connected()
            for uri in order.body.authorizations:
                one, _ = acme.poll(messages.AuthorizationResource(uri=uri, body=messages.Authorization()))
                if one.body.status == messages.STATUS_PENDING:
                    self._answer(acme, one, published)
                else:  # a worker that died after it was validated has left its answer there
                    self._zone.clear(challenges.DNS01.LABEL + "." + one.body.identifier.value)
            order = acme.poll_authorizations(order, deadline)
            order = acme.poll_finalization(order, deadline, fetch_alternative_chains=True)
            return self._issued([order.fullchain_pem, *order.alternative_fullchains_pem], csr_pem)

    def renewal(self, pem: str) -> tuple[int | None, int]:
        """When the CA wants this certificate to be renewed (None: it doesn't say), and when to ask again."""
        with self._trouble():
            moment, ask = self._connected().renewal_time(pem.encode())
            return int(moment.timestamp()) if moment else None, int(ask.timestamp())

    # --- How ---

    def _connected(self) -> client.ClientV2:
        if self._client is None:
            network = _Network(
                josepy.jwk.JWKEC(key=self._key),
                alg=josepy.jwa.ES256,
                verify_ssl=self._settings.directory_ca or True,  # type: ignore[arg-type]  # `requests` takes paths
                user_agent=f"caramel-authority/{__version__}",
                timeout=PATIENCE,
            )
            network.session.hooks["response"].append(network.note)
            acme = client.ClientV2(client.ClientV2.get_directory(self._settings.directory, network), network)
            account = messages.NewRegistration.from_data(
                email=self._settings.contact.removeprefix("mailto:") or None, terms_of_service_agreed=True
            )
            try:
                acme.new_account(account)
            except errors.ConflictError as known:
                network.account = messages.RegistrationResource(uri=known.location, body=messages.Registration())
            self._client = acme
        return self._client

    def _answer(
        self, acme: client.ClientV2, one: messages.AuthorizationResource, published: contextlib.ExitStack
    ) -> None:
        for challenge in one.body.challenges:
            if isinstance(challenge.chall, challenges.DNS01):
                response, value = challenge.chall.response_and_validation(acme.net.key)
                name = challenge.chall.validation_domain_name(one.body.identifier.value)
                published.enter_context(self._zone.challenge(name, value))
                if challenge.status == messages.STATUS_PENDING:
                    acme.answer_challenge(challenge, response)
                return
        raise OrderLost("the CA offers no dns-01 challenge")

    def _issued(self, chains: list[str], csr_pem: str) -> Issued:
        """Of the chains that the CA offers, the first that a device can follow to one of its roots, without that
        root.
        """
        for pem in chains:
            chain = x509.load_pem_x509_certificates(pem.encode())
            chain = [chain[0], *(one for one in chain[1:] if one.subject != one.issuer)]
            if all(_signed(lower, upper) for lower, upper in itertools.pairwise(chain)) and any(
                _signed(chain[-1], root) for root in self._roots
            ):
                break
        else:
            raise OrderLost("none of the CA's chains leads to the roots that the devices have")
        leaf = chain[0]
        if leaf.public_key() != x509.load_pem_x509_csr(csr_pem.encode()).public_key():
            raise OrderLost("the CA's certificate is for another key")
        begin, end = int(leaf.not_valid_before_utc.timestamp()), int(leaf.not_valid_after_utc.timestamp())
        ask = int(time.time()) if "renewalInfo" in self._connected().directory.to_partial_json() else None
        text = "".join(one.public_bytes(PEM).decode() for one in chain)
        return Issued(text, leaf.serial_number, end, end - (end - begin) // 3, ask)

    @contextlib.contextmanager
    def _trouble(self) -> Any:
        """Sorts what can go wrong by what is to be done about it."""
        try:
            yield
        except (requests.RequestException, errors.TimeoutError, errors.ClientError, errors.ARIError) as error:
            seconds = self._left_alone()
            self._client = None  # next time with a new connection and new nonces
            raise TryLater(f"the ACME CA: {error or type(error).__name__}", seconds) from None
        except messages.Error as error:
            if error.code in PASSING:
                raise TryLater(f"the ACME CA: {error}", self._left_alone(error.code == "rateLimited")) from None
            raise OrderLost(str(error)) from None
        except errors.ValidationError as error:
            said = [str(one.error) for failed in error.failed_authzrs for one in failed.body.challenges if one.error]
            raise OrderLost("; ".join(said)) from None
        except (errors.Error, ValueError) as error:
            raise OrderLost(str(error)) from None

    def _left_alone(self, limited: bool = False) -> int:
        network = self._client.net if self._client else None
        seconds = network.retry_after if isinstance(network, _Network) else 0
        return seconds or (3600 if limited else 60)

    @staticmethod
    def _account_key(path: Path) -> Any:
        """The account's key, made at first use; several workers that do that at once agree on one."""
        if not path.exists():
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            temporary.touch(mode=0o600)
            temporary.write_bytes(key_pem(new_key("ec-p256")))
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
            temporary.unlink()
        return serialization.load_pem_private_key(path.read_bytes(), None)


def _resource(uri: str, order: messages.Order) -> str:
    return json.dumps({"uri": uri, "authorizations": order.authorizations, "finalize": order.finalize})


def _signed(lower: x509.Certificate, upper: x509.Certificate) -> bool:
    try:
        lower.verify_directly_issued_by(upper)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True
