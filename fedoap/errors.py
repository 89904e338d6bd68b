"""The one hierarchy of errors.

Every error that a user can cause is a `FedoapError` whose text is one line: subject, value,
expectation, place. The command lines print that line and exit with code 2; anything else is a bug
of ours and keeps its traceback.
"""


class FedoapError(Exception):
    """Anything that a user, an operator or a peer can set right."""


class ConfigError(FedoapError):
    """A configuration file or command-line value is wrong."""


class DataError(FedoapError):
    """A datalist, an image or a mask is wrong."""


class IdentityError(FedoapError):
    """A key, token, signature or certificate is wrong."""


class MessageError(FedoapError):
    """A message does not have the form that its type prescribes."""


class TensorsError(FedoapError):
    """A set of tensors does not match its manifest or the model's schema."""


class ChainError(FedoapError):
    """A record of the chain of rounds does not have the form of its version."""


class SealError(TensorsError):
    """A sealed chunk does not open, or what stands for a key is none."""


class UpdateError(TensorsError):
    """One site's update cannot be merged; `site` is whose, so that the others' can be merged without it."""

    def __init__(self, site: str, reason: str) -> None:
        super().__init__(f"site {site}: {reason}")
        self.site = site


class TrainingError(FedoapError):
    """Training cannot go on: a loss that is not finite, no case to train on."""


class StorageError(FedoapError):
    """The disk refused: full, read-only, locked by another process."""


class DiskError(StorageError):
    """The disk refused a daemon at its work: it may go on once there is room, so it is worth starting again."""


class ProcessError(FedoapError):
    """A process that was started here ended before its work was done."""


class RefusedError(FedoapError):
    """The other side refused what was asked; `code` is its machine-readable reason."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code
