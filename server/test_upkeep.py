# SPDX-License-Identifier: MIT OR Apache-2.0
"""What the units run beside Caramel's own programs: the rotation of the access log, and the wait for the server."""

from __future__ import annotations

import datetime
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Optional

import caramel_wait_online
import pytest
import world
from bench.filtered import PYTHON, SERVER

# --- The access log -----------------------------------------------------------------------------------------

DAY = datetime.timedelta(days=1)


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database as Caramel makes it, with a request in it."""
    folder = tmp_path_factory.mktemp("new")
    file = folder / "caramel.ini"
    file.write_text(
        "[app:main]\nuse = egg:caramel\nsqlalchemy.url = sqlite:///%(here)s/caramel.sqlite?timeout=60\n"
        "ca.cert = none\nca.key = none\n"
    )
    subprocess.run([world.CARAMEL / "caramel_initialize_db", file], env=world.environment(), check=True, timeout=60)
    with closing(sqlite3.connect(folder / "caramel.sqlite")) as database:
        database.execute("INSERT INTO csr (sha256sum, pem, rejected) VALUES (?, ?, 0)", ("0" * 64, b"pem"))
        database.commit()
    return folder


@pytest.fixture
def ini(tmp_path: Path, new: Path) -> Path:
    """The configuration of a Caramel server of this test's own."""
    shutil.copytree(new, tmp_path, dirs_exist_ok=True)
    return tmp_path / "caramel.ini"


def written(ini: Path, *ages: Optional[datetime.timedelta]) -> None:
    """Rows of these ages, as Caramel writes them."""
    now = datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None)
    rows = [(None if age is None else (now - age).isoformat(" ", "microseconds"),) for age in ages]
    with closing(sqlite3.connect(ini.parent / "caramel.sqlite")) as database:
        database.executemany("INSERT INTO accesslog (\"when\", addr, csr_id) VALUES (?, '127.0.0.1', 1)", rows)
        database.commit()


def left(ini: Path) -> list[int]:
    """The numbers of the rows that are there."""
    with closing(sqlite3.connect(ini.parent / "caramel.sqlite")) as database:
        return [number for (number,) in database.execute("SELECT id FROM accesslog ORDER BY id")]


def run(*arguments: str, script: str = "caramel_accesslog.main()", **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PYTHON, "-B", "-c", f"import caramel_accesslog\n{script}", *arguments],
        env=world.environment(PYTHONPATH=str(SERVER), **env),
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_old_rows_go_and_the_others_stay(ini: Path) -> None:
    written(ini, 40 * DAY, 31 * DAY, 29 * DAY, 30 * DAY, 0 * DAY)
    done = run(str(ini))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "accesslog: 3 rows deleted that were older than 30 days\n"
    assert left(ini) == [3, 5]
    assert run(str(ini)).stdout.startswith("accesslog: 0 rows ")
    assert run(str(ini), "--days", "7").stdout == "accesslog: 1 rows deleted that were older than 7 days\n"
    assert left(ini) == [5]


def test_rows_of_a_wrong_clock_dont_stop_it(ini: Path) -> None:
    written(ini, *(1100 * [-9000 * DAY]), None, 40 * DAY, 1 * DAY)
    assert run(str(ini)).stdout.startswith("accesslog: 1102 rows ")
    assert left(ini) == [1103]


#: Between two batches somebody else writes, without waiting, and says how many rows there are.
OTHER_WRITER = """
import sqlite3, sys

def others_turn(seconds):
    with sqlite3.connect({database!r}, timeout=0) as database:
        database.execute("UPDATE csr SET rejected = 1 - rejected")
        print(*database.execute("SELECT count(*) FROM accesslog").fetchone(), seconds >= 0.05)

caramel_accesslog.time.sleep = others_turn
caramel_accesslog.main()
"""


def test_the_server_can_write_after_each_thousand_rows(ini: Path) -> None:
    written(ini, *(2500 * [40 * DAY]), *(1500 * [DAY]))
    done = run(str(ini), script=OTHER_WRITER.format(database=str(ini.parent / "caramel.sqlite")))
    assert done.stdout.splitlines() == [
        "3000 True",
        "2000 True",
        "1500 True",
        "accesslog: 2500 rows deleted that were older than 30 days",
    ], done.stderr


def test_the_database_is_the_one_that_caramel_takes(ini: Path, tmp_path: Path) -> None:
    written(ini, 40 * DAY)
    other = tmp_path / "other"
    other.mkdir()
    (other / "caramel.ini").write_text("[app:main]\nsqlalchemy.url = sqlite:////nonexistent\n")
    done = run(str(other / "caramel.ini"), CARAMEL_DBURL=f"sqlite:///{tmp_path}/caramel.sqlite")
    assert done.stdout.startswith("accesslog: 1 rows "), done.stderr


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "No such file"),
        ("[app:other]\n", "there is no 'app:main'"),
        ("[app:main]\n", "there is no 'sqlalchemy.url'"),
        ("nothing\n", "no section headers"),
        ("[app:main]\nsqlalchemy.url = sqlite:////nonexistent/file\n", "unable to open database file"),
        ("[app:main]\nsqlalchemy.url = nothing\n", "Could not parse"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, text: Optional[str], says: str) -> None:
    if text is not None:
        (tmp_path / "caramel.ini").write_text(text)
    done = run(str(tmp_path / "caramel.ini"))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert done.stderr.startswith("caramel-accesslog: ") and says in done.stderr


# --- The wait -----------------------------------------------------------------------------------------------


def wait(ini: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-B", "-c", "import caramel_wait_online; caramel_wait_online.main()", *arguments, str(ini)],
        env=world.environment(PYTHONPATH=str(SERVER)),
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_it_ends_when_the_server_answers(tmp_path: Path) -> None:
    with world.Caramel(tmp_path / "caramel", world.Authority(tmp_path / "authority")) as server:
        done = wait(server.ini, "--pid", str(os.getpid()))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def listening_at(folder: Path, port: int) -> Path:
    file = folder / "caramel.ini"
    file.write_text(f"[server:main]\nuse = egg:waitress#main\nlisten = 127.0.0.1:{port}\n")
    return file


@pytest.fixture
def broken() -> Iterator[int]:
    """The port of a server whose database is away."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            while True:
                connection, _ = listener.accept()
                with connection:
                    if connection.recv(1000).startswith(b"QUIT"):
                        return
                    connection.sendall(b"HTTP/1.0 500 Internal Server Error\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        port = listener.getsockname()[1]
        yield port
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"QUIT")
        thread.join()


def test_a_server_without_its_database_is_not_waited_for_for_ever(tmp_path: Path, broken: int) -> None:
    done = wait(listening_at(tmp_path, broken), "--seconds", "0.3")
    assert (done.returncode, done.stderr) == (1, "caramel-wait-online: after 0.3 s status 500\n")


def test_a_server_that_says_nothing_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        done = wait(listening_at(tmp_path, silent.getsockname()[1]), "--seconds", "0.3")
    assert (done.returncode, done.stderr) == (1, "caramel-wait-online: after 0.3 s no answer\n")


def test_a_server_that_has_ended_is_not_waited_for(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    done = wait(listening_at(tmp_path, world.free_port()), "--pid", str(ended.pid))
    assert (done.returncode, done.stderr) == (1, "caramel-wait-online: the server has ended\n")


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("listen = 127.0.0.1:6543", ("127.0.0.1", 6543)),
        ("listen = *:6543 [::1]:6544", ("127.0.0.1", 6543)),
        ("listen = [::]:6543", ("::1", 6543)),
        ("listen = [2001:db8::1]:6543", ("2001:db8::1", 6543)),
        ("host = 0.0.0.0\nport = 6543", ("127.0.0.1", 6543)),
        ("port = 6543", ("127.0.0.1", 6543)),
        ("unix_socket = %(here)s/socket", "{folder}/socket"),
    ],
)
def test_it_asks_where_the_server_listens(tmp_path: Path, text: str, address: caramel_wait_online.Address) -> None:
    (tmp_path / "caramel.ini").write_text(f"[server:main]\nuse = egg:waitress#main\n{text}\n")
    if isinstance(address, str):
        address = address.format(folder=tmp_path)
    assert caramel_wait_online.listens_at(tmp_path / "caramel.ini") == address


@pytest.mark.parametrize("text", ["", "[server:main]\nlisten = nowhere\n", "nothing\n"])
def test_without_an_address_it_says_so(tmp_path: Path, text: str) -> None:
    (tmp_path / "caramel.ini").write_text(text)
    done = wait(tmp_path / "caramel.ini")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert done.stderr.startswith("caramel-wait-online: ")
