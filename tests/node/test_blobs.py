import errno
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from fedoap.errors import StorageError
from fedoap.manifests import BlobManifest, TensorSpec
from fedoap.tensors import write_blob
from fedoap_node.blobs import BlobStore

MIB = 1 << 20


def blob(tmp_path: Path) -> tuple[BlobManifest, bytes]:
    manifest = write_blob(tmp_path / "source", {"w": np.arange(1000, dtype=np.float32)})
    return manifest, (tmp_path / "source").read_bytes()


def stored(store: BlobStore, manifest: BlobManifest, data: bytes) -> None:
    store.open(manifest.id, manifest)
    store.write(manifest.id, 0, data)
    store.finish(manifest.id, manifest)


def test_a_finished_part_is_a_blob_with_its_manifest_after_a_restart(tmp_path: Path) -> None:
    manifest, data = blob(tmp_path)
    stored(BlobStore(tmp_path / "state"), manifest, data)

    again = BlobStore(tmp_path / "state")

    files = again.files(manifest.id)
    assert again.stored() == {manifest.id}
    assert files.blob.read_bytes() == data
    assert hashlib.sha256(files.manifest.read_bytes()).digest() == manifest.id


def large(tmp_path: Path) -> tuple[BlobManifest, bytes]:
    """Three chunks, the last one short."""
    manifest = write_blob(tmp_path / "large", {"w": np.arange(600_000, dtype=np.float32)})
    return manifest, (tmp_path / "large").read_bytes()


def test_a_download_goes_on_behind_the_last_chunk_that_is_right_and_is_whole_in_the_end(tmp_path: Path) -> None:
    manifest, data = large(tmp_path)
    store = BlobStore(tmp_path / "state")
    store.open(manifest.id, manifest)
    store.write(manifest.id, 0, data[:MIB])
    store.write(manifest.id, MIB, data[MIB : MIB + 100])

    again = BlobStore(tmp_path / "state")

    assert (again.stored(), again.partly()) == (frozenset(), {manifest.id: MIB})
    again.open(manifest.id, manifest, MIB)
    again.write(manifest.id, MIB, data[MIB : 2 * MIB])
    again.write(manifest.id, 2 * MIB, data[2 * MIB :])
    again.finish(manifest.id, manifest)
    assert again.files(manifest.id).blob.read_bytes() == data
    assert list((tmp_path / "state" / "parts").iterdir()) == []


@pytest.mark.parametrize("spoil", ["first chunk", "manifest", "manifest gone", "nothing written"])
def test_a_part_that_is_not_known_to_be_right_is_gone_after_a_restart(tmp_path: Path, spoil: str) -> None:
    """Planted bug: the number of bytes that were written, taken for that of bytes that are right."""
    manifest, data = large(tmp_path)
    store = BlobStore(tmp_path / "state")
    store.open(manifest.id, manifest)
    parts = tmp_path / "state" / "parts"
    described = parts / f"{manifest.id.hex()}.manifest"
    if spoil != "nothing written":
        store.write(manifest.id, 0, data[:MIB])
    match spoil:
        case "first chunk":
            store.write(manifest.id, 5, b"\xff")
        case "manifest":
            described.write_bytes(blob(tmp_path)[0].pack())
        case "manifest gone":
            described.unlink()
        case _:
            pass
    store.close()

    assert BlobStore(tmp_path / "state").partly() == {}
    assert list(parts.iterdir()) == []


def begun(folder: Path) -> tuple[BlobStore, bytes]:
    """Return a store that was started anew while a blob, and which, had its first chunk."""
    manifest, data = large(folder)
    store = BlobStore(folder / "state")
    store.open(manifest.id, manifest)
    store.write(manifest.id, 0, data[:MIB])
    store.close()
    return BlobStore(folder / "state"), manifest.id


def test_parts_of_blobs_that_nobody_wants_go_when_a_task_is_over(tmp_path: Path) -> None:
    again, _ = begun(tmp_path)

    again.keep_only([])

    assert list((tmp_path / "state" / "parts").iterdir()) == []


def test_a_part_of_a_blob_that_is_wanted_stays_until_its_turn_comes(tmp_path: Path) -> None:
    """Planted bug: only those parts kept that are being written."""
    again, blob = begun(tmp_path)

    again.keep_only([blob])

    assert again.partly() == {blob: MIB}


@pytest.mark.parametrize("lost", ["part", "room"])
def test_a_download_never_goes_on_in_a_file_that_lacks_its_start(tmp_path: Path, lost: str) -> None:
    """Planted bugs: the part made anew where it is gone; a spare put in its place."""
    (manifest, data), (old, bytes_of_old) = large(tmp_path), another(tmp_path)
    store, parts = BlobStore(tmp_path / "state"), tmp_path / "state" / "parts"
    store.open(manifest.id, manifest)
    store.write(manifest.id, 0, data[:MIB])
    stored(store, old, bytes_of_old)
    store.keep_only([])
    if lost == "part":
        store.drop(manifest.id)
    else:
        (parts / f"{manifest.id.hex()}.manifest").unlink()
        (parts / f"{manifest.id.hex()}.manifest").mkdir()

    with pytest.raises(StorageError, match="no room for"):
        store.open(manifest.id, manifest, MIB)


def test_a_manifest_without_its_blob_is_not_counted_as_stored(tmp_path: Path) -> None:
    manifest, _ = blob(tmp_path)
    store = BlobStore(tmp_path / "state")
    store.files(manifest.id).manifest.write_bytes(manifest.pack())

    assert store.stored() == frozenset()


def test_a_full_disk_refuses_a_part_before_a_byte_is_written(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "state")

    with pytest.raises(StorageError, match="no room for"):
        store.open(b"\1" * 32, BlobManifest((TensorSpec("w", "float32", (1 << 38, 1 << 20)),), b""))

    assert list((tmp_path / "state" / "parts").iterdir()) == []


def test_writing_to_a_dropped_part_does_nothing_and_finishing_it_is_an_error(tmp_path: Path) -> None:
    manifest, data = blob(tmp_path)
    store = BlobStore(tmp_path / "state")
    store.open(manifest.id, manifest)
    store.drop(manifest.id)

    store.write(manifest.id, 0, data)

    with pytest.raises(StorageError, match="is gone"):
        store.finish(manifest.id, manifest)


def test_only_the_blobs_named_are_kept(tmp_path: Path) -> None:
    manifest, data = blob(tmp_path)
    other = write_blob(tmp_path / "other", {"w": np.zeros(3, np.float32)})
    store = BlobStore(tmp_path / "state")
    stored(store, manifest, data)
    stored(store, other, (tmp_path / "other").read_bytes())

    store.keep_only([other.id])

    assert store.stored() == {other.id}
    assert len(list((tmp_path / "state" / "blobs").iterdir())) == 2


def another(tmp_path: Path) -> tuple[BlobManifest, bytes]:
    """As long as the large one, with other bytes."""
    manifest = write_blob(tmp_path / "another", {"w": np.ones(600_000, dtype=np.float32)})
    return manifest, (tmp_path / "another").read_bytes()


def test_a_part_in_an_old_blobs_place_has_none_of_its_bytes_counted(tmp_path: Path) -> None:
    """Planted bug: a file's size taken for what has arrived."""
    (manifest, data), (old, bytes_of_old) = large(tmp_path), another(tmp_path)
    store = BlobStore(tmp_path / "state")
    stored(store, old, bytes_of_old)
    place = store.files(old.id).blob.stat().st_ino
    store.keep_only([])
    store.open(manifest.id, manifest)
    part = tmp_path / "state" / "parts" / manifest.id.hex()
    assert part.stat().st_ino == place
    store.write(manifest.id, 0, data[:MIB])

    assert BlobStore(tmp_path / "state").partly() == {manifest.id: MIB}


def test_old_blobs_are_off_the_disk_for_good_before_their_place_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted bug: no sync of the folder: a power cut could bring back the old name over the new bytes."""
    old, data = another(tmp_path)
    store, blobs = BlobStore(tmp_path / "state"), tmp_path / "state" / "blobs"
    stored(store, old, data)
    synced = list[list[Path]]()
    monkeypatch.setattr("fedoap_node.blobs.sync_folder", lambda folder: synced.append(list(folder.iterdir())))

    store.keep_only([])

    assert list(blobs.iterdir()) == []
    assert synced == [[]]


def test_spares_are_given_up_before_a_part_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug: spares that outlast a full disk."""
    (manifest, data), (old, bytes_of_old) = blob(tmp_path), another(tmp_path)
    store, spares = BlobStore(tmp_path / "state"), tmp_path / "state" / "spares"
    stored(store, old, bytes_of_old)
    store.keep_only([])
    really = os.posix_fallocate

    def fallocate(descriptor: int, at: int, size: int) -> None:
        if list(spares.iterdir()):
            raise OSError(errno.ENOSPC, "full")
        really(descriptor, at, size)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    stored(store, manifest, data)

    assert store.files(manifest.id).blob.read_bytes() == data


def test_no_descriptor_stays_open_after_many_parts(tmp_path: Path) -> None:
    manifest, data = blob(tmp_path)
    store = BlobStore(tmp_path / "state")
    before = len(list(Path("/proc/self/fd").iterdir()))

    for _ in range(5):
        stored(store, manifest, data)
    store.open(manifest.id, manifest)
    store.close()

    assert len(list(Path("/proc/self/fd").iterdir())) == before
