"""Settings: baked-in < configuration file < environment < options.

Responsible for where a value comes from and whether it is well-formed. Leaves to others what costs time: the
CA certificates are parsed in ``trust``, the hardware is asked in ``hardware``. A run that finds the key file
locked pays for this module, so it imports next to nothing.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Optional

from .errors import UsageError

CONFIG_FILE = "/etc/caramel-embedded.conf"
# Of an instance, the identity of one service: its settings come after those that are common to all.
INSTANCE_CONFIG_FILE = "/etc/caramel-embedded/%s.conf"
INSTANCE_KEY_FILE = "/var/lib/caramel/%s/identity.pem"
KEY_FILE = "/var/lib/caramel/identity.pem"
TIMEOUT = 60.0
OF_A_HOOK = ("CARAMEL_CN", "CARAMEL_KEY_FILE")  # what a hook finds in its environment, and is no setting inside of it
MAXIMUM_WAIT = 5.0  # seconds for a configuration that comes through a pipe
# What a key type is called, and its bits where it is RSA.
KEY_TYPES = {"rsa-2048": 2048, "rsa-4096": 4096, "ec-p256": 0}

# Key exchanges of TLS: P-256 alone, or what OpenSSL offers by itself.
GROUPS = ("small", "default")

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_DIGITS = "0123456789"
CLIENT_ID_CHARACTERS = frozenset(_LETTERS + _DIGITS + "._:-")
_HOST_CHARACTERS = frozenset(_LETTERS + _DIGITS + "._-")
_ADDRESS_CHARACTERS = frozenset(_DIGITS + "abcdefABCDEF:.")
_NAME_CHARACTERS = frozenset(_LETTERS + _DIGITS + "_")
# What a POSIX shell, systemd and this program all read alike without quotes.
_PLAIN_CHARACTERS = frozenset(_LETTERS + _DIGITS + "_./:@%+,=-[]")


def is_client_id(text: str) -> bool:
    """Whether `text` is 1 to 64 of ``A-Z a-z 0-9 . _ : -``.

    64 is ub-common-name (RFC 5280, appendix A.1). The server copies the ID unescaped into ``subjectAltName``,
    where a comma would add names: hence the short list of characters.
    """
    return 0 < len(text) <= 64 and CLIENT_ID_CHARACTERS.issuperset(text)


def same_name(one: str, other: str) -> bool:
    """Whether two client IDs are one: host names, which have a dot, compare without case (RFC 4343)."""
    return one == other or ("." in one and one.lower() == other.lower())


def client_id(text: str) -> str:
    """`text` if it is a client ID. Raises `UsageError`."""
    if not isinstance(text, str) or not is_client_id(text):
        raise UsageError("%r is no client ID: 1 to 64 of A-Z a-z 0-9 . _ : -" % (text,))
    return text


def instance(text: str) -> str:
    """`text` if it can be the name of an instance: a client ID, and of a folder. Raises `UsageError`."""
    if not is_client_id(text) or text.startswith("."):
        raise UsageError(
            "--instance: %r is no name of an instance: 1 to 64 of A-Z a-z 0-9 . _ : -, and no dot at first" % text
        )
    return text


def key_type(text: str) -> str:
    """`text` if it is a type of keys. Raises `UsageError`."""
    if text not in KEY_TYPES:
        raise UsageError("%r is no key type: one of %s" % (text, ", ".join(KEY_TYPES)))
    return text


def groups(text: str) -> str:
    """`text` if it says which key exchanges to offer. Raises `UsageError`."""
    if text not in GROUPS:
        raise UsageError("%r is neither of %s" % (text, ", ".join(GROUPS)))
    return text


def domain(text: str) -> str:
    """`text` in lower case, if it is a domain name that a client ID can be put in front of. Raises `UsageError`."""
    name = text.lower().strip(".")
    if not _HOST_CHARACTERS.issuperset(name) or "_" in name or not all(map(_is_label, name.split("."))):
        raise UsageError("%r is no domain name" % text)
    if len(name) > 60:
        raise UsageError("%r is too long: with the ID in front of it a client ID has 64 characters at most" % text)
    return name


def server(text: str) -> tuple[str, int]:
    """The host name or address, and the port (443 where none is given), of ``HOST[:PORT]``.

    An IPv6 address is in brackets where a port follows (RFC 3986, 3.2.2). Raises `UsageError`.
    """
    host, port = text, "443"
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            host = ""
        elif rest:
            port = rest[1:]
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    if ":" in host:
        good = _ADDRESS_CHARACTERS.issuperset(host)
    else:
        good = _HOST_CHARACTERS.issuperset(host) and all(map(_is_label, host.split(".")))
    if not host or "/" in text or len(host) > 253 or not good:
        raise UsageError("%r is no server name: HOST or HOST:PORT, without https:// and path" % text)
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65536):
        raise UsageError("%r has no port from 1 to 65535 behind its colon" % text)
    return host, int(port)


def host_and_port(address: tuple[str, int]) -> str:
    """What `server` reads as `address`."""
    return ("[%s]:%d" if ":" in address[0] else "%s:%d") % address


def _is_label(label: str) -> bool:
    """Whether `label` can be one label of a host name (RFC 1123, 2.1; underscores are seen in the field)."""
    return 0 < len(label) <= 63 and not label.startswith("-") and not label.endswith("-")


def _path(text: str) -> str:
    if "\0" in text:
        raise UsageError("%r is no path" % text)
    if os.path.basename(text) in ("", ".", ".."):
        raise UsageError("%r is the path of a folder, and no file's" % text)
    return os.path.abspath(text)


def _interfaces(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    # dev_valid_name() in Linux: at most 15 bytes, not "." or "..", no slash, no white space
    if not all(n and len(n) < 16 and n not in (".", "..") and "/" not in n and not n.count(" ") for n in names):
        raise UsageError("%r is no list of network interfaces: eth0,wlan0" % text)
    return names


def _owner(text: str) -> int:
    import pwd  # most devices name no owner

    try:
        return _number(text) if text.isdigit() else pwd.getpwnam(text).pw_uid
    except (KeyError, ValueError):  # a NUL in it, say
        raise UsageError("there is no user %r" % text) from None


def _group(text: str) -> int:
    import grp

    try:
        return _number(text) if text.isdigit() else grp.getgrnam(text).gr_gid
    except (KeyError, ValueError):
        raise UsageError("there is no group %r" % text) from None


def _number(text: str) -> int:
    if not text.isascii() or int(text) > 0xFFFFFFFE:  # (uid_t) -1 means "leave it" to chown(2)
        raise UsageError("%r is no user or group number" % text)
    return int(text)


def _mode(text: str) -> int:
    if not (0 < len(text) <= 4 and set(text) <= set("01234567") and int(text, 8) <= 0o777):
        raise UsageError("%r is no octal mode such as 0600 or 0640" % text)
    return int(text, 8)


def _timeout(text: str) -> float:
    # float() takes more than a person would: 1_0, nan, digits of other scripts.
    digits = text.replace(".", "", 1)
    seconds = float(text) if digits.isascii() and digits.isdigit() else 0.0
    if not 0.0 < seconds <= 86400.0:
        raise UsageError("%r is no time limit: a number of seconds, more than 0, at most 86400" % text)
    return seconds


def _command(text: str) -> tuple[str, ...]:
    import shlex  # most devices have no hook, and no chip for keys

    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise UsageError("%r is no command: %s" % (text, error)) from None
    if not words or not words[0] or "\0" in text:
        raise UsageError("%r is no command" % text)
    return words


# Name in the environment and the files; what makes a value of its text; option, placeholder, help.
SETTINGS: tuple[tuple[str, Callable[[str], Any], str, str, str], ...] = (
    ("CARAMEL_CA", server, "--server", "HOST[:PORT]", "the Caramel server; the port is 443 by default"),
    ("CARAMEL_CA_CERT", _path, "--ca-cert", "PATH", "PEM file of the only CA to trust; by default the one built in"),
    ("CARAMEL_IDENTITY_CA", _path, "--identity-ca", "PATH", "PEM file of the CA of the devices; by default the same"),
    ("CARAMEL_KEY_FILE", _path, "--key-file", "PATH", "key, certificate and request; by default " + KEY_FILE),
    ("CARAMEL_CN", client_id, "--client-id", "ID", "who this device is; by default from the hardware"),
    ("CARAMEL_INTERFACES", _interfaces, "--interfaces", "A,B", "interfaces whose MAC may be the ID; by default all"),
    ("CARAMEL_DOMAIN", domain, "--domain", "NAME", "is added to an ID from the hardware; by default none"),
    ("CARAMEL_KEY_TYPE", key_type, "--key-type", "TYPE", "of new keys: rsa-2048 (the default), rsa-4096 or ec-p256"),
    ("CARAMEL_KEY_COMMAND", _command, "--key-command", "COMMAND", "makes keys in a TPM or token; by default none"),
    ("CARAMEL_OPENSSL_CONF", _path, "--openssl-conf", "PATH", "OpenSSL's settings for such keys; by default none"),
    ("CARAMEL_GROUPS", groups, "--groups", "GROUPS", "key exchange: small (the default), or default (OpenSSL's own)"),
    ("CARAMEL_OWNER", _owner, "--owner", "USER", "owner of the key file; by default the caller"),
    ("CARAMEL_GROUP", _group, "--group", "GROUP", "group of the key file; by default the caller's"),
    ("CARAMEL_MODE", _mode, "--mode", "OCTAL", "mode of the key file; by default 0600"),
    ("CARAMEL_TIMEOUT", _timeout, "--timeout", "SECONDS", "limit on all that waits on the network; by default 60"),
    ("CARAMEL_HOOK", _command, "--hook", "COMMAND", "run after a new certificate is in place; by default none"),
    ("CARAMEL_CONFIG", _path, "--config", "PATH", "configuration file; by default " + CONFIG_FILE),
)
VALUES: Mapping[str, Callable[[str], Any]] = {name: value for name, value, *_ in SETTINGS}
# What a hook and scripts around it find in their environment beside settings.
NO_SETTINGS = frozenset(("CARAMEL_NOT_AFTER", "CARAMEL_IN_HOOK"))
# Beginnings of what other programs of the house read: the scripts, and the registration authority.
OTHERS = ("CARAMEL_EMBEDDED", "CARAMEL_AUTHORITY_")
COMMAND_LINE, INSTANCE = "the command line", "the option --instance"


def parse(text: str, source: str) -> dict[str, str]:
    """The ``NAME=value`` lines of `text`; `source` names it in errors.

    Only what a POSIX shell (``. FILE``), systemd (``EnvironmentFile=``, systemd.exec(5)) and this program read
    alike is accepted: a value with anything but letters, digits and ``_./:@%+,=-[]`` stands in quotes, and
    backslash, dollar and backquote stand nowhere. Raises `UsageError` that names the line.
    """
    values = {}
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals or not name or name[0] in _DIGITS or not _NAME_CHARACTERS.issuperset(name):
            raise UsageError("%s, line %d: not of the form NAME=value" % (source, number))
        if value[:1] in ("'", '"'):
            quote, value, closing = value[0], value[1:-1], value[1:][-1:]
            if closing != quote or quote in value:
                raise UsageError("%s, line %d: the quotes don't match" % (source, number))
        elif not _PLAIN_CHARACTERS.issuperset(value):
            raise UsageError("%s, line %d: put the value of %s in quotes" % (source, number, name))
        if not value.isprintable() or not {"\\", "$", "`"}.isdisjoint(value):
            raise UsageError("%s, line %d: %s has a character that can't be in a value" % (source, number, name))
        values[name] = value
    return values


def check(values: Mapping[str, str], source: str) -> None:
    """Raises `UsageError` for a name that is no setting, or a value that isn't well-formed.

    For a build, which has somebody to tell: a device that meets a name it doesn't know goes on, because its
    configuration may be newer than its firmware.
    """
    for name, text in values.items():
        if name not in VALUES:
            raise UsageError("%s: there is no setting %s" % (source, name))
        if text and name not in ("CARAMEL_OWNER", "CARAMEL_GROUP"):  # those are known on the device only
            _value(name, text, source)


def _value(name: str, text: str, source: str) -> Any:
    try:
        return VALUES[name](text)
    except UsageError as error:
        raise UsageError("%s: %s" % (_given(name, source), error)) from None


def _given(name: str, source: str) -> str:
    """How a person finds the setting `name` that `source` has: the option itself, or the name and its place."""
    flags = {known: flag for known, _, flag, *_ in SETTINGS}
    return flags[name] if source == COMMAND_LINE else "%s, from %s" % (name, source)


def baked(name: str) -> Optional[bytes]:
    """The data file `name` that the firmware's build put into this package; None where it put none."""
    loader = globals()["__loader__"]
    try:
        data: bytes = loader.get_data(os.path.join(os.path.dirname(__file__), name))
    except OSError:  # FileNotFoundError from a folder, a plain OSError from a zip
        return None
    return data


def _read(path: str, what: str) -> bytes:
    """The content of a file; of a pipe or FIFO what comes before it is closed, within `MAXIMUM_WAIT`.

    Raises FileNotFoundError, `UsageError`.
    """
    if path in _STANDARD_INPUT:
        raise UsageError("%s can't be read from standard input: name a file, or a FIFO" % what)
    try:
        # Nothing that stands in the place of a file, a FIFO say, may make a run wait for long.
        with open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            pipe = stat.S_ISFIFO(os.fstat(file.fileno()).st_mode)
            data = b"".join(_pieces(file)) if pipe else file.read(_TOO_LONG)
    except FileNotFoundError:
        raise
    except TimeoutError:
        raise UsageError("%s %s is a pipe that nobody has written to and closed" % (what, path)) from None
    except OSError as error:
        raise UsageError("%s %s can't be read: %s" % (what, path, error.strerror)) from None
    if len(data or b"") >= _TOO_LONG:
        raise UsageError("%s %s is far too long" % (what, path))
    return _utf8(data or b"")


_TOO_LONG = 1 << 20
#: A shell starts what it waits for in the background with /dev/null there (POSIX, 2.9.3.1): it would count as empty.
_STANDARD_INPUT = ("/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")


def _pieces(pipe: Any) -> Iterator[bytes]:
    """What comes through a pipe, until all of its writers have closed it. Raises TimeoutError."""
    import select  # few configurations come through a pipe
    import time

    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    end, length = time.monotonic() + MAXIMUM_WAIT, 0
    while length < _TOO_LONG:
        left = end - time.monotonic()
        # Before the first writer of a FIFO has come poll(2) says nothing; read(2) would say that all have gone.
        if left <= 0 or not poll.poll(left * 1000):
            raise TimeoutError
        piece = pipe.read(65536)
        if piece == b"":
            return
        length += len(piece or b"")
        yield piece or b""


def _utf8(data: bytes) -> bytes:
    """A text without the byte order mark that some editors put before it, and in UTF-8 where that says UTF-16."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        data = data.decode("utf-16", "replace").encode()
    return data[3:] if data.startswith(b"\xef\xbb\xbf") else data


def _text(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError("%s, line %d: not UTF-8 text" % (source, line)) from None


class ClientId(NamedTuple):
    """Who the device is.

    Attributes: text; source: where it is from, for a person; hardware: what vouches for it and is remembered with a
    new identity, see ``hardware``; empty where somebody gave the ID.
    """

    text: str
    source: str
    hardware: tuple[str, ...] = ()


class Permissions(NamedTuple):
    """Whose a file is, by numbers, and its mode."""

    owner: int
    group: int
    mode: int


class Settings(NamedTuple):
    """What one run is to do, every value well-formed.

    Attributes: server: host and port, or None; ca_cert_file, identity_ca_file: paths or None; key_file: absolute
    path; client_id: or None (ask the hardware); interfaces: or None (the physical ones); domain: or None; key_type;
    key_command: words, or None; openssl_conf: path, or None; groups; permissions: of the key file; timeout: seconds;
    hook: words, or None; build_time: seconds since 1970, UTC, 0 where the build left none; unknown: names that look
    like settings, and that this version doesn't know; sources: where the value of each setting comes from; replace:
    whether a good identity of another name may be given up.
    """

    server: Optional[tuple[str, int]]
    ca_cert_file: Optional[str]
    identity_ca_file: Optional[str]
    key_file: str
    client_id: Optional[str]
    interfaces: Optional[tuple[str, ...]]
    domain: Optional[str]
    key_type: str
    key_command: Optional[tuple[str, ...]]
    openssl_conf: Optional[str]
    groups: str
    permissions: Permissions
    timeout: float
    hook: Optional[tuple[str, ...]]
    build_time: float
    unknown: tuple[str, ...]
    sources: Mapping[str, str]
    replace: bool = False

    @classmethod
    def read(
        cls,
        options: Mapping[str, str],
        environment: Mapping[str, str],
        instance: Optional[str] = None,
        replace: bool = False,
    ) -> Settings:
        """Reads the configuration files. `options` has the names of the environment; `instance`: its name, or None;
        `replace`: as the option. Raises `UsageError`."""
        data = baked("baked.conf")
        base = parse(_text(data, "the baked-in settings"), "the baked-in settings") if data else {}
        build_time = base.pop("BUILD_TIME", "0")
        # A hook has them of its own: a run that it starts with another configuration is about another identity. So is
        # one of an instance, whose own file may say otherwise; options win over the environment.
        others = environment.get("CARAMEL_IN_HOOK") or instance is not None
        names = [name for name in VALUES if not others or name not in OF_A_HOOK]
        layers: list[tuple[str, Mapping[str, str]]] = [
            (COMMAND_LINE, options),
            ("the environment", {name: environment[name] for name in names if environment.get(name)}),
            ("the baked-in settings", base),
        ]
        named = _first(layers, "CARAMEL_CONFIG")
        given = _given("CARAMEL_CONFIG", named[0]) + ": " if named else ""
        files = [_configuration(str(named[1]) if named else CONFIG_FILE, named is not None, given)]
        if instance is not None:
            values = {"CARAMEL_CN": instance, "CARAMEL_KEY_FILE": INSTANCE_KEY_FILE % instance}
            files = [_configuration(INSTANCE_CONFIG_FILE % instance, False), (INSTANCE, values), *files]
        layers[2:2] = files
        unknown = {name for _, values in (*files, ("", environment)) for name in values if _is_misspelt(name)}
        found = {name: first for name in VALUES for first in [_first(layers, name)] if first}

        def get(name: str, default: Any = None) -> Any:
            return found[name][1] if name in found else default

        return cls(
            server=get("CARAMEL_CA"),
            ca_cert_file=get("CARAMEL_CA_CERT"),
            identity_ca_file=get("CARAMEL_IDENTITY_CA"),
            key_file=get("CARAMEL_KEY_FILE", KEY_FILE),
            client_id=get("CARAMEL_CN"),
            interfaces=get("CARAMEL_INTERFACES"),
            domain=get("CARAMEL_DOMAIN"),
            key_type=get("CARAMEL_KEY_TYPE", "rsa-2048"),
            key_command=get("CARAMEL_KEY_COMMAND"),
            openssl_conf=get("CARAMEL_OPENSSL_CONF"),
            groups=get("CARAMEL_GROUPS", "small"),
            permissions=Permissions(
                get("CARAMEL_OWNER", os.geteuid()), get("CARAMEL_GROUP", os.getegid()), get("CARAMEL_MODE", 0o600)
            ),
            timeout=get("CARAMEL_TIMEOUT", TIMEOUT),
            hook=get("CARAMEL_HOOK"),
            build_time=int(build_time) if build_time.isascii() and build_time.isdigit() else 0,
            unknown=tuple(sorted(unknown)),
            sources={name: source for name, (source, _) in found.items()},
            replace=replace,
        )

    @property
    def by_hand(self) -> bool:
        """Whether a person gives the client ID, as an option, or by trying an instance's configuration by hand."""
        source = self.sources.get("CARAMEL_CN", "")
        of_an_instance = os.path.dirname(source) == os.path.dirname(INSTANCE_CONFIG_FILE)
        tried = of_an_instance and "CARAMEL_KEY_FILE" not in self.sources
        return source in (COMMAND_LINE, INSTANCE) or tried

    def ca_cert(self) -> bytes:
        """The PEM text of the trusted CA: the named file's, else the baked-in one. Raises `UsageError`."""
        data = self._certificate("CARAMEL_CA_CERT", self.ca_cert_file, "baked.pem", "the CA certificate")
        if data is None:
            raise UsageError("no CA certificate: give one with --ca-cert or CARAMEL_CA_CERT")
        return data

    def identity_ca(self) -> Optional[bytes]:
        """The PEM text of the CA that signs this device; None: the one above. Raises `UsageError`."""
        what = "the identity's CA certificate"
        return self._certificate("CARAMEL_IDENTITY_CA", self.identity_ca_file, "baked-identity.pem", what)

    def _certificate(self, name: str, path: Optional[str], built_in: str, what: str) -> Optional[bytes]:
        if not path:
            return baked(built_in)
        what = "%s: %s" % (_given(name, self.sources[name]), what)
        try:
            data = _read(path, what)
        except FileNotFoundError:
            raise UsageError("%s %s is not there" % (what, path)) from None
        if b"-----BEGIN CERTIFICATE-----" not in data:
            raise UsageError("%s %s holds no certificate in PEM form" % (what, path))
        return data


def _configuration(path: str, needed: bool, given: str = "") -> tuple[str, Mapping[str, str]]:
    """What a configuration file sets, and its path; `given`: how its path was. Raises `UsageError`."""
    what = given + "the configuration file"
    try:
        return path, parse(_text(_read(path, what), path), path)
    except FileNotFoundError:
        if needed:
            raise UsageError("%s %s is not there" % (what, path)) from None
        return path, {}


def _is_misspelt(name: str) -> bool:
    """Whether a name that is no setting was perhaps to be one: CARAMEL_TIMOUT, CARMEL_CA, caramel_ca."""
    if name in VALUES or name in NO_SETTINGS or name.startswith(OTHERS):
        return False
    begin, _, rest = name.upper().partition("_")
    missing = list("CARAMEL")
    wrong = 0
    for letter in begin:
        if letter in missing:
            missing.remove(letter)
        else:
            wrong += 1
    return bool(rest) and wrong + len(missing) <= 2


def _first(layers: Sequence[tuple[str, Mapping[str, str]]], name: str) -> Optional[tuple[str, Any]]:
    """The first layer that has a value for the setting `name`, and that value; None where none has one."""
    for source, values in layers:
        # An empty value counts as not set: where a template leaves one, the device goes on with what it had.
        if values.get(name):
            return source, _value(name, values[name], source)
    return None
