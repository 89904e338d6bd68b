"""What `wire.updates = "packed"` saves: the product's network, trained on phantoms, its updates packed.

    PYTHONPATH=. python benchmarks/packing.py

After `--warm` steps the weights are those that a round begins with; after 2, 10, 20 and 100 steps more they are its
update. Prints what the update takes as it is, alone (packed against zeros: what zstd finds in the weights themselves),
as XOR with the round's weights, and as the product's difference, in parts of the plain float32 bytes; and how fast
packing and unpacking are, against a copy of the file. Each update is checked to come back to the last bit.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import zstandard
from torch import Tensor

from fedoap.config import NetworkConfig
from fedoap.manifests import ITEM_BYTES, BlobManifest, Dtype, UploadManifest
from fedoap.messages import CHUNK_BYTES
from fedoap.packing import LEVEL, PackedUpdate, pack_blob
from fedoap.segmentation.network import FedOAPNet
from fedoap.segmentation.objectives import segmentation_loss
from fedoap.segmentation.phantoms import phantom
from fedoap.tensors import write_blob

STEPS = (2, 10, 20, 100)
SIZE, BATCH, CASES = 64, 8, 32
REPEATS = 5
Blob = tuple[Path, BlobManifest]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warm", type=int, default=100, help="steps before the round")
    parser.add_argument("--width", type=int, default=32, help="of the network")
    parser.add_argument("--rate", type=float, default=1e-3, help="of AdamW")
    options = parser.parse_args()
    states = trained(options.width, options.rate, options.warm)
    _, before = next(states)
    print(f"{sum(one.size for one in before.values())} weights, rate {options.rate:g}, {options.warm} steps before")
    print("steps  dtype     plain  alone    xor  packed  pack MB/s  unpack MB/s  copy MB/s")
    with tempfile.TemporaryDirectory() as folder:
        for steps, after in states:
            for dtype in ("float32", "bfloat16"):
                print(row(Path(folder), steps, dtype, before, after), flush=True)


def trained(width: int, rate: float, warm: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yield the weights after the steps before the round, and after each of `STEPS` more."""
    network = FedOAPNet(NetworkConfig(width=width, attention="projection"), seed=0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate)
    cases = [phantom("brain-mr", (SIZE, SIZE), 0, patient, 0) for patient in range(CASES)]
    images = torch.stack([scaled(torch.tensor(case.image, dtype=torch.float32)) for case in cases])[:, None]
    masks = torch.stack([torch.tensor(case.label > 0) for case in cases])[:, None]
    order = torch.Generator().manual_seed(0)
    for step in range(warm + STEPS[-1] + 1):
        if step == warm or step - warm in STEPS:
            yield step - warm, {name: one.detach().numpy().copy() for name, one in network.named_parameters()}
        chosen = torch.randint(CASES, (BATCH,), generator=order)
        optimizer.zero_grad(set_to_none=True)
        segmentation_loss(network(images[chosen]), masks[chosen]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def scaled(image: Tensor) -> Tensor:
    """Return an image with mean 0 and deviation 1."""
    return (image - image.mean()) / image.std()


def row(folder: Path, steps: int, dtype: Dtype, before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> str:
    """Return one line of the table."""
    names = ("before", "after", "zeros")
    zeros = {name: np.zeros_like(one) for name, one in before.items()}
    old, new, nothing = (
        (folder / name, write_blob(folder / name, state, dtype))
        for name, state in zip(names, (before, after, zeros), strict=True)
    )
    plain = 4 * sum(one.size for one in after.values())
    packed = folder / "packed"
    update = UploadManifest(bytes(32), "site", 1, (), pack_blob(*new, *old, packed))
    assert PackedUpdate(packed, update, old).read(0, new[1].size) == new[0].read_bytes()
    alone = pack_blob(*new, *nothing, folder / "alone").size
    sizes = (new[1].size, alone, xor_size(new[0], old[0], ITEM_BYTES[dtype]), update.blob.size)
    actions: tuple[Callable[[], object], ...] = (
        lambda: pack_blob(*new, *old, packed),
        lambda: PackedUpdate(packed, update, old).read(0, new[1].size),
        lambda: shutil.copyfile(new[0], folder / "copy"),
    )
    rates = [new[1].size / seconds(action) / 1e6 for action in actions]
    return (
        f"{steps:5}  {dtype:8}"
        + "".join(f"{size / plain:7.3f}" for size in sizes)
        + " "
        + "".join(f"{rate:11.0f}" for rate in rates)
    )


def xor_size(new: Path, old: Path, item: int) -> int:
    """Return what XOR in the difference's place would take, all else alike."""
    change = np.bitwise_xor(*(np.frombuffer(path.read_bytes(), np.uint8) for path in (new, old)))
    packer = zstandard.ZstdCompressor(level=LEVEL)
    pieces = (change[at : at + CHUNK_BYTES].reshape(-1, item).T.tobytes() for at in range(0, len(change), CHUNK_BYTES))
    return sum(len(packer.compress(piece)) for piece in pieces)


def seconds(action: Callable[[], object]) -> float:
    """Return the median time that an action takes."""
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        action()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
