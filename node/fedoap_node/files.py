"""Files that are whole and on the disk for good, or not there."""

import os
import shutil
from pathlib import Path

from fedoap.errors import StorageError
from fedoap.identity import sync_folder


def write_durably(path: Path, data: bytes) -> None:
    """Leave the file with these bytes; a crash at any point leaves the old file or the new one.

    Raises:
        StorageError: the disk refused.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise StorageError(f"{path}: cannot be written: {error.strerror}") from None


def sync_tree(folder: Path) -> None:
    """Make every file in the folder, and the folder itself, durable."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync_file(Path(place) / name)
        sync_folder(Path(place))


def sync_file(path: Path) -> None:
    """Make one file's content durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def share(source: Path, target: Path) -> None:
    """Leave the source's content under the target's name too: the same bytes on disk where it can be so."""
    if target.exists():
        return
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    try:
        draft.hardlink_to(source)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, draft)
        sync_file(draft)
    draft.replace(target)


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
