# SPDX-License-Identifier: MIT OR Apache-2.0
"""From 2.0.0 to 3.0.0: what is decided about a device and not about a request; indexes for 90 000 devices."""

import sqlalchemy as sa
from alembic import op
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("requests", sa.Column("device", sa.String(64), nullable=False, server_default=""))
    # 2.0.0 took ASCII only.
    op.execute("UPDATE requests SET device = rtrim(lower(client_id), '.')")
    op.create_index("ix_requests_device", "requests", ["device", "state"])
    op.create_index("ix_requests_state", "requests", ["state", "posted"])

    op.create_table(
        "keys",
        sa.Column("key_sha256", sa.String(64), primary_key=True),
        sa.Column("device", sa.String(64), nullable=False),
    )
    op.execute("INSERT INTO keys SELECT key_sha256, min(device) FROM requests GROUP BY key_sha256")
    op.create_table(
        "sightings",
        sa.Column("sha256", sa.String(64), sa.ForeignKey("requests.sha256"), primary_key=True),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("address", sa.String(45)),
    )
    op.create_index("ix_sightings_at", "sightings", ["at"])
    op.create_table(
        "bars",
        sa.Column("device", sa.String(64), primary_key=True),
        sa.Column("kind", sa.String(10), nullable=False),
        sa.Column("since", sa.BigInteger, nullable=False),
        sa.Column("who", sa.String(100), nullable=False),
    )
    op.create_table(
        "limits",
        sa.Column("name", sa.String(200), primary_key=True),
        sa.Column("until", sa.BigInteger, nullable=False),
        sa.Column("reason", sa.Text),
    )
    op.create_table(
        "zone_names",
        sa.Column("name", sa.String(255), primary_key=True),
        sa.Column("seen", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "refused",
        sa.Column("about", sa.String(80), primary_key=True),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("line", sa.Text, nullable=False),
    )

    for column in (
        sa.Column("publish_after", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("publish_problem", sa.Text),
        sa.Column("again", sa.Integer, nullable=False, server_default="0"),
        sa.Column("expected", sa.String(64)),
    ):
        op.add_column("devices", column)
    _one_row_a_device()
    op.create_index("ix_devices_sha256", "devices", ["sha256"])
    wanted = sa.text("address IS NOT NULL AND (published IS NULL OR published <> address)")
    op.create_index(
        "ix_devices_to_publish", "devices", ["publish_after"], sqlite_where=wanted, postgresql_where=wanted
    )

    op.add_column("certificates", sa.Column("not_before", sa.BigInteger, nullable=False, server_default="0"))
    op.add_column("certificates", sa.Column("usages", sa.String(60)))
    _what_certificates_say()
    op.create_index("ix_certificates_not_after", "certificates", ["not_after"])

    op.add_column("orders", sa.Column("renewal", sa.Integer, nullable=False, server_default="0"))
    op.create_index("ix_orders_sha256", "orders", ["sha256"])
    op.create_index("ix_orders_due", "orders", ["due"])
    op.add_column("log", sa.Column("chain", sa.String(64)))
    op.create_index("ix_log_action", "log", ["action", "at"])
    op.create_index("ix_log_client_id", "log", ["client_id"])


def _one_row_a_device() -> None:
    """IDs that differ in case only are one device: of several rows, the one that was admitted first stays."""
    db = op.get_bind()
    devices = sa.table("devices", sa.column("client_id"), sa.column("added"), sa.column("sha256"))
    first: dict[str, str] = {}
    order = (devices.c.sha256.is_(None), devices.c.added, devices.c.client_id)
    for client_id in db.execute(sa.select(devices.c.client_id).order_by(*order)).scalars().all():
        if first.setdefault(client_id.lower().rstrip("."), client_id) != client_id:
            db.execute(sa.delete(devices).where(devices.c.client_id == client_id))
    for device, client_id in first.items():
        if device != client_id:
            db.execute(sa.update(devices).where(devices.c.client_id == client_id).values(client_id=device))


def _what_certificates_say() -> None:
    db = op.get_bind()
    names = ("id", "pem", "not_before", "usages")
    certificates = sa.table("certificates", *map(sa.column, names))
    usages = {ExtendedKeyUsageOID.CLIENT_AUTH: "client", ExtendedKeyUsageOID.SERVER_AUTH: "server"}
    last = 0
    while rows := db.execute(
        sa.select(certificates).where(certificates.c.id > last).order_by(certificates.c.id).limit(1000)
    ).all():
        for row in rows:
            leaf = x509.load_pem_x509_certificate(row.pem.encode())
            found = [one.value for one in leaf.extensions if isinstance(one.value, x509.ExtendedKeyUsage)]
            db.execute(
                sa.update(certificates)
                .where(certificates.c.id == row.id)
                .values(
                    not_before=int(leaf.not_valid_before_utc.timestamp()),
                    usages=" ".join(sorted(usages[one] for value in found for one in value if one in usages)),
                )
            )
        last = rows[-1].id
