"""Field-level encryption for AlphaPulse: what an application imports; not the engine, and not Dagster.

What an application needs is importable from here. It loads neither the orchestration nor the
migration engine; the types for SQLAlchemy are in `alphapulse_encryption.orm`.
"""

from alphapulse_encryption.runtime import (
    decrypt_field,
    decrypt_fields,
    encrypt_field,
    encrypt_fields,
    get_cipher,
    get_searchable_cipher,
    reset_ciphers,
)

__all__ = [
    "decrypt_field",
    "decrypt_fields",
    "encrypt_field",
    "encrypt_fields",
    "get_cipher",
    "get_searchable_cipher",
    "reset_ciphers",
]
