"""Encrypted attributes and columns for SQLAlchemy; not the engine, and no driver.

    class User(Base):
        __tablename__ = "users"
        id: Mapped[int] = mapped_column(primary_key=True)
        email: Mapped[str] = encrypted(EncryptedString("user_pii"), String(255), search=True)

    session.scalars(select(User).where(User.email == "user@example.com"))

What `User.email` reads and writes depends on the phase of its table (`configure`, `ALPHAPULSE_ENCRYPTION_PHASE`), and
the model and its queries stay as they are from the plaintext to the drop. The types can also be used by themselves, on
columns of envelopes (`mapped_column("email_encrypted", EncryptedString("user_pii"))`).
"""

from alphapulse_encryption.orm.bulk import copy_rows, encrypted_values
from alphapulse_encryption.orm.declaration import encrypted
from alphapulse_encryption.orm.phases import Phase, check_phases, configure, reset_phases
from alphapulse_encryption.orm.types import (
    EncryptedBoolean,
    EncryptedBytes,
    EncryptedDate,
    EncryptedDateTime,
    EncryptedFloat,
    EncryptedInteger,
    EncryptedJSON,
    EncryptedNumeric,
    EncryptedString,
    EncryptedText,
    EncryptedTypeError,
    EncryptedUUID,
    EncryptedValueError,
    SearchToken,
)

__all__ = [
    "EncryptedBoolean",
    "EncryptedBytes",
    "EncryptedDate",
    "EncryptedDateTime",
    "EncryptedFloat",
    "EncryptedInteger",
    "EncryptedJSON",
    "EncryptedNumeric",
    "EncryptedString",
    "EncryptedText",
    "EncryptedTypeError",
    "EncryptedUUID",
    "EncryptedValueError",
    "Phase",
    "SearchToken",
    "check_phases",
    "configure",
    "copy_rows",
    "encrypted",
    "encrypted_values",
    "reset_phases",
]
