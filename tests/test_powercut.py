"""The judges of `make powercut`: that they see a loss. Only `make powercut` itself starts machines."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Optional, cast

import pytest
import world
from powercut import runs, stores, verdict, volatile
from powercut.load import content
from powercut.verdict import DRAFT, KEY_FILE, File
from torture.fleet import Fleet, key_file_parts

SECTOR = volatile.SECTOR
EXT4, FAT = stores.STORES["ext4"], stores.STORES["vfat"]


def disk_with(*letters: bytes) -> volatile.Disk:
    """A disk whose sectors hold these letters, flushed."""
    disk = volatile.Disk(SECTOR * len(letters))
    disk.write(0, b"".join(letter * SECTOR for letter in letters))
    disk.flush()
    return disk


def letters_on(disk: volatile.Disk) -> bytes:
    return bytes(disk.data[::SECTOR])


def test_a_cut_leaves_what_was_flushed() -> None:
    for how in volatile.CUTS:
        disk = disk_with(b"a", b"b")
        disk.write(0, b"1" * SECTOR)
        disk.flush()
        disk.write(SECTOR, b"2" * SECTOR)
        disk.cut(random.Random(0), how)
        assert letters_on(disk)[:1] == b"1"
    assert disk.cut(random.Random(0), "none") == 0


def test_any_sector_may_survive_without_the_others_or_those_before() -> None:
    found: dict[str, set[bytes]] = {how: set() for how in volatile.CUTS}
    for how, states in found.items():
        for seed in range(200):
            disk = disk_with(b"a", b"b", b"c")
            for sector, letter in enumerate((b"1", b"2", b"3")):
                disk.write(sector * SECTOR, letter * SECTOR)
            disk.cut(random.Random(seed), how)
            states.add(letters_on(disk))
    assert found["all"] == {b"123"} and found["none"] == {b"abc"}
    assert found["prefix"] == {b"abc", b"1bc", b"12c", b"123"}
    assert len(found["half"]) == 8


def test_after_the_last_request_the_power_is_gone() -> None:
    disk = disk_with(b"a", b"b")
    disk.watch(2)
    disk.write(0, b"1" * SECTOR)
    disk.flush()
    with pytest.raises(volatile.PowerLost):
        disk.write(SECTOR, b"2" * SECTOR)
    with pytest.raises(volatile.PowerLost):
        disk.flush()
    assert disk.wait(2, 0) and letters_on(disk) == b"1b"
    disk.cut(random.Random(0), "all")
    disk.write(SECTOR, b"2" * SECTOR)  # it is back
    assert letters_on(disk) == b"12"


def key_file(data: bytes, path: str = KEY_FILE, mode: int = EXT4.mode, owner: int = EXT4.owner) -> File:
    return File(path, mode, owner, EXT4.group, data)


@pytest.mark.parametrize(
    ("files", "floor", "word"),
    [
        ([], None, "absent"),
        ([key_file(b"")], None, "absent"),
        ([], 4, "lost"),
        ([key_file(b"")], 4, "lost"),
        ([key_file(content(3))], 4, "lost"),
        ([key_file(content(4))], 4, "old"),
        ([key_file(content(5))], 4, "new"),
        ([key_file(content(5)[:-1])], 4, "torn"),
        ([key_file(content(5)[:512] + b"\0" * 512 + content(5)[1024:])], 4, "torn"),
        ([key_file(content(5), mode=0o644)], 4, "wrong mode"),
        ([key_file(content(5), owner=0)], 4, "wrong mode"),
        ([key_file(content(5)), key_file(content(6), path=DRAFT, mode=0o600, owner=0)], 4, "new"),
        ([key_file(content(5)), key_file(content(6), path=DRAFT, mode=0o644)], 4, "wrong mode"),
    ],
)
def test_what_a_cut_has_left_of_the_replaces(files: list[File], floor: Optional[int], word: str) -> None:
    assert verdict.of_replaces(EXT4, files, floor)[0] == word


def test_what_was_lost_fails_unless_it_is_documented() -> None:
    rows = [verdict.Row(EXT4), verdict.Row(replace(EXT4, promised=False))]
    for row in rows:
        row.count("old", "cut 1")
        assert not row.failed
        row.count("lost", "cut 2")
        assert row.lines == ["lost: cut 2"]
    assert [row.failed for row in rows] == [True, False]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> world.Authority:
    return world.Authority(tmp_path_factory.mktemp("authority"))


def test_what_a_cut_has_left_of_a_run(authority: world.Authority) -> None:
    name = "fe0000000001"
    older, newer, other = (authority.identity(name, certified=number < 2) for number in range(3))
    parts = key_file_parts(older)
    assert parts and parts.certificate

    known: list[str] = []
    history = runs.History(cast(Fleet, SimpleNamespace(requests=lambda client_id: known)), name)

    def word(data: Optional[bytes], **rights: Any) -> str:
        return runs.verdict(history, EXT4, [] if data is None else [key_file(data, **rights)])

    assert word(None) == "absent" and word(other) == "new"
    known[:] = [parts.sha256]
    assert word(None) == word(b"") == "lost"  # the server has a request, and its key is gone
    assert word(other) == word(newer) == "lost"  # another key
    assert word(older[:900]) == "torn"
    history.kept = older
    assert word(older) == "old"
    assert word(older, mode=0o644) == "wrong mode"
    assert word(older.replace(parts.certificate, b"")) == "lost"  # acknowledged, and gone
    renewed = authority.sign(parts.request)
    assert word(older.replace(parts.certificate, renewed)) == "lost"  # from where?
    history.certificate = renewed
    assert word(older.replace(parts.certificate, renewed)) == "new"
