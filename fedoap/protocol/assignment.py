"""A task as it reaches a site: nothing is done that the federation did not sign, for this site and this plan."""

import hashlib

from fedoap.config import Plan
from fedoap.errors import ConfigError, IdentityError, MessageError
from fedoap.identity import TASK_CONTEXT, is_signed
from fedoap.manifests import TaskManifest
from fedoap.messages import Task, Welcome
from fedoap.protocol.course import Step, course


def read_plan(message: Welcome, body: bytes, federation: str) -> Plan:
    """Return the plan that the coordinator sent.

    Raises:
        ConfigError: it has another hash than the message names, is another federation's, or of another version.
    """
    if hashlib.sha256(body).digest() != message.plan:
        raise ConfigError("plan from the coordinator does not have the hash that its message names")
    plan = Plan.from_bytes(body)
    if plan.digest != message.plan:
        raise ConfigError("plan from the coordinator is not in the form of this version")
    if plan.federation != federation:
        raise ConfigError(f"plan is federation {plan.federation}'s, but this site belongs to {federation}")
    return plan


def read_task(message: Task, body: bytes, federation_key: bytes, plan: Plan, site: str) -> TaskManifest:
    """Return the manifest of a task that this site is to do.

    Raises:
        MessageError: body and hash differ, or federation, plan, course or cohort do not fit.
        IdentityError: the federation did not sign it.
        TensorsError: it is no manifest.
    """
    if hashlib.sha256(body).digest() != message.task:
        raise MessageError("task does not name its body's hash")
    if not is_signed(federation_key, message.signature, TASK_CONTEXT, body):
        raise IdentityError("task is not signed by the federation's key")
    manifest = TaskManifest.unpack(body)
    if manifest.federation != plan.federation:
        raise MessageError(f"task is federation {manifest.federation}'s, but this site belongs to {plan.federation}")
    if manifest.plan != plan.digest:
        raise MessageError("task goes by another plan than the coordinator sent")
    if any(blob.packing for blob in manifest.blobs):
        raise MessageError("task's model or bank is packed, but only updates may be")
    if site not in manifest.cohort:
        raise MessageError(f"task is not for site {site}")
    if Step(manifest.kind, manifest.round) not in course(plan):
        raise MessageError(f"task {manifest.kind} of round {manifest.round} is not in the plan's course")
    return manifest


def place(manifest: TaskManifest, plan: Plan) -> tuple[int, int]:
    """Return the task's place in the course: a site never goes back to one that lies behind it."""
    return course(plan).index(Step(manifest.kind, manifest.round)), manifest.attempt
