"""Adapters for use elsewhere: a PEFT directory, encrypted on request with age (age-encryption.org/v1).

Recipients are age X25519 keys ("age1...") or SSH public keys. An encrypted file has ``.age`` behind its name and
opens with ``age -d -i <identity>``; we keep nothing that could open it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mint_engine.errors import UserError

if TYPE_CHECKING:
    from mint_engine.adapters import Adapter
    from mint_engine.bases import Base

AGE_SUFFIX = ".age"
MAX_RECIPIENTS = 10


def parse_recipients(recipients: Sequence[str] | None) -> list[Any]:
    """pyrage recipients; none if there are to be no secrets.

    Raises:
        UserError: one is not a public key (or is a private one, which must not be sent).
    """
    if recipients is None:
        return []
    if isinstance(recipients, str) or not 1 <= len(recipients) <= MAX_RECIPIENTS:
        got = repr(recipients) if isinstance(recipients, str) else f"{len(recipients)}"
        raise UserError(f"age_encryption_recipients: expected a list of 1 to {MAX_RECIPIENTS} public keys, got {got}")
    return [_parse(recipient, i) for i, recipient in enumerate(recipients)]


def _parse(recipient: str, index: int) -> Any:
    import pyrage

    at = f"(recipient {index})"
    if not isinstance(recipient, str):
        raise UserError(f"age_encryption_recipients: expected a string, got {type(recipient).__name__} {at}")
    if recipient.upper().startswith("AGE-SECRET-KEY"):
        raise UserError(f"age_encryption_recipients: expected a public key, got a secret one: keep it to yourself {at}")
    kind = pyrage.ssh if recipient.startswith("ssh-") else pyrage.x25519
    try:
        return kind.Recipient.from_str(recipient)
    except pyrage.RecipientError as error:
        raise UserError(
            f"age_encryption_recipients: expected 'age1...' or an SSH public key, got {recipient[:20]!r}: {error} {at}"
        ) from error


def save_external(snapshot: Adapter, base: Base, recipients: Sequence[Any]) -> Callable[[Path], None]:
    """A writer of the PEFT directory, each file encrypted if there are ``recipients`` (of `parse_recipients`)."""
    from mint_engine.state import save_adapter

    plain = save_adapter(snapshot, base)

    def write(directory: Path) -> None:
        plain(directory)
        if recipients:
            encrypt_files(directory, recipients)

    return write


def encrypt_files(directory: Path, recipients: Sequence[Any]) -> None:
    """Replace every file of the directory with its encrypted form."""
    import pyrage

    for path in sorted(p for p in directory.iterdir() if p.is_file()):
        pyrage.encrypt_file(str(path), str(path.with_name(path.name + AGE_SUFFIX)), list(recipients))
        path.unlink()
