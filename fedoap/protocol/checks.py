"""What an offered result must be before one byte of it is taken: pure checks against task, plan and schema."""

import hashlib
from collections.abc import Mapping

from fedoap.config import Plan
from fedoap.errors import RefusedError, TensorsError
from fedoap.identity import UPLOAD_CONTEXT, Member, is_signed
from fedoap.manifests import TaskKind, TaskManifest, TensorSpec, UploadManifest
from fedoap.messages import Offer
from fedoap.params import PERSONAL_PREFIX

WEIGHED_KINDS: frozenset[TaskKind] = frozenset({"train", "seed", "bank"})
"""Where the number of cases is a weight, and 0 would mean that a site has nothing to say."""

Table = Mapping[str, tuple[str, tuple[int, ...]]]


def read_offer(member: Member, message: Offer, body: bytes) -> UploadManifest:
    """Return the manifest that the site offers, its origin proved.

    Raises:
        RefusedError: body and hash differ, it is no manifest, another key signed it, or it names another site.
    """
    if hashlib.sha256(body).digest() != message.upload:
        raise RefusedError("malformed", "offer does not name its body's hash")
    if not is_signed(member.signing_key, message.signature, UPLOAD_CONTEXT, body):
        raise RefusedError("bad_signature", f"offer is not signed by the key that site {member.name} enrolled")
    try:
        manifest = UploadManifest.unpack(body)
    except TensorsError as error:
        raise RefusedError("malformed", str(error)) from None
    if manifest.site != member.name:
        raise RefusedError("foreign", f"offer is made out for another site than {member.name}, which sent it")
    return manifest


def check_result(upload: UploadManifest, task: TaskManifest, plan: Plan, schema: tuple[TensorSpec, ...] | None) -> None:
    """Return if the upload holds what its task asks for.

    Raises:
        RefusedError: it stands for no case, its table of tensors is another (the first difference is named), or
            it is not packed as the plan says.
    """
    if upload.cases == 0 and task.kind in WEIGHED_KINDS:
        raise RefusedError("cases", f"result of site {upload.site} stands for 0 cases, but at least 1 is needed")
    given, wanted = _table(upload.blob.tensors), _wanted(upload, task.kind, plan, schema)
    for name in sorted(given.keys() | wanted.keys()):
        if name not in given:
            raise RefusedError("schema", f"tensor {name} is missing")
        if name not in wanted:
            raise RefusedError("schema", f"tensor {name} is not one of those that {task.kind} returns")
        if given[name] != wanted[name]:
            raise RefusedError("schema", f"tensor {name} is {_show(given[name])}, but must be {_show(wanted[name])}")
    _check_packing(upload, task, plan)


def _check_packing(upload: UploadManifest, task: TaskManifest, plan: Plan) -> None:
    packing, packs = upload.blob.packing, task.kind == "train" and plan.wire.updates == "packed"
    result = f"result of {task.kind} of site {upload.site}"
    if packing is None and packs:
        raise RefusedError("schema", f"{result} is not packed, but wire.updates is packed")
    if packing is not None and not packs:
        raise RefusedError("schema", f"{result} is packed, but wire.updates is plain, or it is no update")
    if packing is not None and (task.model is None or packing.base != task.model.id):
        wanted = task.model.id.hex()[:12] if task.model else "none"
        raise RefusedError(
            "schema", f"{result} is packed against {packing.base.hex()[:12]}, but must be against {wanted}"
        )


def _wanted(upload: UploadManifest, kind: TaskKind, plan: Plan, schema: tuple[TensorSpec, ...] | None) -> Table:
    match kind:
        case "train":
            assert schema is not None  # the course starts with `init`, whose result is the schema
            return _table(schema)
        case "init":
            shared = [spec for spec in upload.blob.tensors if not spec.name.startswith(PERSONAL_PREFIX)]
            return {spec.name: (plan.wire.dtype, spec.shape) for spec in shared}
        case "seed" | "bank":
            slots = _slots(upload, plan.bank.slots) if kind == "seed" else plan.bank.slots
            sums = ("float32", (slots, plan.network.bottleneck))
            return {"counts": ("int64", (slots,)), "patients": ("int64", (slots,)), "keys": sums, "values": sums}
        case "calibrate":
            return {}


def _slots(upload: UploadManifest, most: int) -> int:
    lengths = [spec.shape[0] for spec in upload.blob.tensors if spec.name == "counts" and spec.shape]
    return min(most, *lengths) if lengths else most


def _table(specs: tuple[TensorSpec, ...]) -> Table:
    return {spec.name: (spec.dtype, spec.shape) for spec in specs}


def _show(row: tuple[str, tuple[int, ...]]) -> str:
    dtype, shape = row
    return f"{dtype} {list(shape)}"
