"""Exceptions of the engine and its clients.

A caller's mistake is a `UserError`, which is a `ValueError`: the message names the argument, what was
expected, what came and where. Everything else that the engine raises on purpose is a `MintError`.
"""

from __future__ import annotations


class MintError(Exception):
    """Base class of every error raised on purpose."""


class UserError(MintError, ValueError):
    """The caller's mistake: a bad argument, a bad datum, a bad configuration."""


class NotFoundError(UserError, LookupError):
    """A session, run, sampler, checkpoint or model that does not exist (or no longer does)."""


class AuthenticationError(UserError):
    """A server wants a key, or does not know the one it was given (401)."""


class PermissionDeniedError(UserError):
    """A server does not do this for this caller (403)."""


class BillingError(MintError):
    """A server wants to be paid (402). Ours never does."""


class NonFiniteError(UserError):
    """A loss, a gradient or an input is NaN or infinite. The step is refused, the adapter is unchanged."""


class CheckpointError(UserError):
    """A checkpoint is damaged, incomplete, or does not fit the model it is loaded into."""


class ModelError(UserError):
    """A base model is unknown, unsupported, incomplete or damaged."""


class StorageError(MintError, OSError):
    """The disk refused: full, read-only, unreachable. `errno` is that of the operating system.

    Whatever was being written has been removed; what was there before is still there.
    """


class TransportError(MintError):
    """A connection to a server was asked for and cannot be had."""


class EngineClosedError(MintError, RuntimeError):
    """Work was given to an engine, session or model that has been closed."""


class SampleCancelledError(MintError):
    """A sample was given up because the one who asked for it said so. What it had drawn is lost."""


class SidecarError(MintError):
    """Of the SDK's helper process, for scripts that catch it. There is no such process here: nothing raises it."""


class ExperimentalWarning(FutureWarning):
    """The SDK's warning of what may change, for scripts that filter it. Nothing here gives it."""
