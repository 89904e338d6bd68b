"""Updates that are packed: taken where the plan says so, against their task's model, and refused otherwise."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from desk import Arrays, Desk
from federation_builders import config
from fedoap.manifests import HASH_BYTES, Packing, UploadManifest
from fedoap.messages import Commit, Go, Refuse
from simulated.training import SHAPES

GOOD: Arrays = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
PACKED = b"\xff" * 12
"""No float32 that is finite."""


@pytest.mark.parametrize(
    ("updates", "packed_against", "reason"),
    [
        ("plain", "its model", "is packed, but wire.updates is plain, or it is no update"),
        ("packed", "", "is not packed, but wire.updates is packed"),
        ("packed", "another", "is packed against 000000000000, but must be against "),
    ],
)
def test_an_update_that_is_not_packed_as_the_plan_says_is_refused(
    updates: str, packed_against: str, reason: str
) -> None:
    """Planted bugs: packing is not looked at; its base is not."""
    desk = Desk(config=config(updates=updates))
    desk.to_train()
    manifest, _ = desk.result("alpha", GOOD)

    (answer,) = desk.offer("alpha", _packed(desk, manifest, packed_against))

    assert isinstance(answer, Refuse)
    assert answer.code == "schema"
    assert answer.reason.startswith(f"result of train of site alpha {reason}")


def test_a_packed_update_is_taken_as_the_bytes_that_it_is() -> None:
    """They are no floats. Planted bug: packed bytes looked at for numbers that are not finite."""
    desk = Desk(config=config(updates="packed"))
    desk.to_train()
    manifest, _ = desk.result("alpha", GOOD)
    packed = _packed(desk, manifest, "its model")

    (answer,) = desk.offer("alpha", packed)

    assert isinstance(answer, Go)
    assert isinstance(desk.send("alpha", packed, PACKED)[-1], Commit)


def _packed(desk: Desk, manifest: UploadManifest, against: str) -> UploadManifest:
    assert desk.task.model is not None
    base = {"its model": desk.task.model.id, "another": bytes(32)}.get(against)
    if base is None:
        return manifest
    chunks = len(manifest.blob.hashes) // HASH_BYTES
    packing = Packing(base, (len(PACKED) - chunks + 1, *[1] * (chunks - 1)))
    return replace(manifest, blob=replace(manifest.blob, hashes=hashlib.sha256(PACKED).digest(), packing=packing))
