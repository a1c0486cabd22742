# SPDX-License-Identifier: MIT OR Apache-2.0
"""A registration authority for devices that speak the Caramel protocol.

    signing_request   is what was posted a request that may be signed at all?
    registry          who decides, what was decided, and what a device is told
    ca                signer `ca`: a CA of one's own
    orders, acme_ca   signer `acme`: a queue of orders, and the talk with the ACME CA
    zone              records in the devices' zone: challenges and addresses
    store             the tables, and how a transaction begins
    application       HTTP (WSGI)
    cli               the administrator's command
    configuration     the file

All moments are whole seconds since 1970 in UTC, all durations seconds, unless a name says otherwise.
"""

__version__ = "1.0.0"
