import mmap
import sys
from pathlib import Path

import pytest

from fedoap.spares import Spares

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="leases are Linux's")


def written(path: Path, data: bytes = b"old") -> Path:
    path.write_bytes(data)
    return path


def test_a_spare_takes_the_place_of_a_new_file_of_its_size(tmp_path: Path) -> None:
    spares, old = Spares(tmp_path / "spares"), written(tmp_path / "old")
    inode = old.stat().st_ino

    spares.keep(old)

    assert not old.exists()
    assert not spares.take(tmp_path / "new", 4)
    assert spares.take(tmp_path / "new", 3)
    assert (tmp_path / "new").stat().st_ino == inode
    assert not spares.take(tmp_path / "another", 3)


@pytest.mark.parametrize("held", ["open", "mapped", "linked"])
def test_a_file_that_somebody_still_reads_is_deleted_instead(tmp_path: Path, held: str) -> None:
    """Planted bugs: no lease; no look at the number of links. The reader would see other bytes."""
    spares, old = Spares(tmp_path / "spares"), written(tmp_path / "old")
    with old.open("rb") as reader:
        view = mmap.mmap(reader.fileno(), 3, prot=mmap.PROT_READ)
        if held == "linked":
            (tmp_path / "link").hardlink_to(old)
            view.close()
        elif held == "open":
            view.close()
        if held != "open":
            reader.close()

        spares.keep(old)

        assert not old.exists()
        assert not spares.take(tmp_path / "new", 3)
        assert list((tmp_path / "spares").iterdir()) == []


def test_the_oldest_spares_go_and_a_restart_begins_with_none(tmp_path: Path) -> None:
    """Planted bug: no bound."""
    spares = Spares(tmp_path / "spares", 2)
    for size in (1, 2, 3):
        spares.keep(written(tmp_path / "old", bytes(size)))

    assert not spares.take(tmp_path / "new", 1)
    assert spares.take(tmp_path / "new", 2)
    Spares(tmp_path / "spares")
    assert list((tmp_path / "spares").iterdir()) == []


def test_all_are_given_up_when_room_is_needed(tmp_path: Path) -> None:
    spares = Spares(tmp_path / "spares")
    spares.keep(written(tmp_path / "old"))

    assert spares.clear()
    assert not spares.clear()
    assert not spares.take(tmp_path / "new", 3)
