import pytest

from federation_builders import CHUNK_BYTES


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few numbers are several chunks, so that small tensors take every path of a transfer."""
    monkeypatch.setattr("fedoap.manifests.CHUNK_BYTES", CHUNK_BYTES)
    monkeypatch.setattr("fedoap.tensors.CHUNK_BYTES", CHUNK_BYTES)
    monkeypatch.setattr("fedoap.transfer.CHECKPOINT_CHUNKS", 1)
