# SPDX-License-Identifier: MIT OR Apache-2.0
"""What an administrator watches, in Prometheus' form, on an address of its own: devices never reach it.

Everything is counted in the database when it is asked for, but the answers that this process has given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy import Connection, func, select
from sqlalchemy.exc import DBAPIError

from . import store
from .ca import Certificates, end_of
from .configuration import Configuration
from .errors import TryLater, WrongUsage
from .registry import Registry
from .rollover import calendar
from .store import AUTHORIZED, REJECTED, certificates, now, orders, requests, sightings

DAY = 86400
#: Seconds: a device that has not asked for so long is silent, a certificate that ends so soon should be renewed.
SILENT, SOON = 3 * DAY, 2 * DAY


class Metrics(Collector):
    def __init__(self, registry: Registry, configuration: Configuration) -> None:
        self._registry = registry
        self._ca = Certificates(configuration.ca) if configuration.signer == "ca" else None
        self._collectors = CollectorRegistry()
        self.answers = Counter(
            "caramel_authority_answers", "Answers to devices.", ["method", "status"], registry=self._collectors
        )
        self._collectors.register(self)

    def answered(self, method: str, status: int) -> None:
        # Whatever else somebody sends as a method is not to make a time series each.
        known = method if method in ("GET", "HEAD", "POST") else "other"
        self.answers.labels(known, str(status)).inc()

    def serve(self, address: str) -> None:
        """Answers at HOST:PORT from now on, in a thread. Raises WrongUsage."""
        host, _, port = address.rpartition(":")
        try:
            start_http_server(int(port), host.strip("[]"), self._collectors)
        except (OSError, ValueError, OverflowError) as error:
            raise WrongUsage(f"--metrics {address}: {error}") from None

    def describe(self) -> list[Any]:
        return []  # asked when it is registered, when there may be no database yet

    def collect(self) -> Iterator[GaugeMetricFamily]:
        healthy = 1
        try:
            self._registry.look()
        except (DBAPIError, TryLater, WrongUsage):
            healthy = 0
        yield _gauge("healthy", "1: devices can be answered, and what is due can be signed.", {(): healthy})
        try:
            with self._registry.store.reading() as db:
                yield from self._counted(db)
        except DBAPIError:
            pass  # as `healthy` says
        if self._ca:
            yield from self._ends(self._ca)

    def _counted(self, db: Connection) -> Iterator[GaugeMetricFamily]:
        number = func.count()
        states = dict.fromkeys((store.PENDING, AUTHORIZED, REJECTED), 0)
        for state, count in db.execute(select(requests.c.state, number).group_by(requests.c.state)):
            states[state] = count
        yield _gauge("requests", "Requests by what was decided.", {(k,): v for k, v in states.items()}, "state")

        # Of each request only the certificate that ends last counts.
        later = certificates.alias()
        newer = select(later.c.id).where(later.c.sha256 == certificates.c.sha256, later.c.not_after >= now() + SOON)
        ending = (
            select(func.count(certificates.c.sha256.distinct()))
            .join(requests, requests.c.sha256 == certificates.c.sha256)
            .where(certificates.c.not_after.between(now(), now() + SOON), requests.c.state == AUTHORIZED)
            .where(~newer.exists())
        )
        text = "Devices whose certificate ends within two days, and that have no newer one."
        yield _gauge("certificates_ending", text, {(): db.execute(ending).scalar_one()})

        silent = select(number).select_from(sightings.join(requests, requests.c.sha256 == sightings.c.sha256))
        silent = silent.where(requests.c.state == AUTHORIZED, sightings.c.at < now() - SILENT)
        text = "Authorized devices that have not asked for three days."
        yield _gauge("devices_silent", text, {(): db.execute(silent).scalar_one()})

        failed = orders.c.problem.is_not(None)
        waiting = {
            ("waiting",): db.execute(select(number).select_from(orders).where(~failed)).scalar_one(),
            ("failed",): db.execute(select(number).select_from(orders).where(failed)).scalar_one(),
        }
        yield _gauge("orders", "Orders at the ACME CA; what has failed is made again.", waiting, "state")

        front = store.number(db, "front")
        if front:
            text = "When the certificate of the TLS front ends that was made last."
            yield _gauge("front_not_after_seconds", text, {(): front})

    @staticmethod
    def _ends(ca: Certificates) -> Iterator[GaugeMetricFamily]:
        try:
            known, dates = ca.known(), calendar(ca)
        except WrongUsage:
            return
        chains = {"signs": known.chain, "next": known.next, "old": known.old}
        ends = {(role,): end_of(chain) for role, chain in chains.items() if chain}
        yield _gauge("ca_not_after_seconds", "When a CA, or one above it, ends.", ends, "ca")
        steps = {(what,): moment for moment, what in dates}
        yield _gauge("ca_step_seconds", "Until when the next step has to be taken.", steps, "step")


def _gauge(name: str, text: str, values: Mapping[Any, float], *labels: str) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"caramel_authority_{name}", text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family
