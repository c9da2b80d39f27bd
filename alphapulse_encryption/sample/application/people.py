"""Who is who: registration, login, API keys."""

from __future__ import annotations

import hashlib
import secrets
from datetime import UTC, datetime, timedelta

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerifyMismatchError
from fastapi import HTTPException
from sqlalchemy import select
from sqlalchemy.orm import Session

from alphapulse_encryption.sample.application.models import ApiKey, User

SESSION_HOURS = 12
EVERYTHING = ["read", "trade", "manage"]

# The smallest of the settings that OWASP's password storage cheat sheet recommends for argon2id.
passwords = PasswordHasher(time_cost=2, memory_cost=19_456, parallelism=1)


class NotAllowed(HTTPException):
    """Says neither what was wrong nor whether there is such a person."""

    def __init__(self) -> None:
        super().__init__(401, "Not allowed.")


def log_in(session: Session, email: str, password: str) -> str:
    """A key for the person with this address.

    The query is what it was before anything was encrypted: `User.email` asks the right column in every phase.
    """
    user = session.scalars(select(User).where(User.email == email)).one_or_none()
    if user is None or not user.is_active:
        raise NotAllowed
    try:
        passwords.verify(user.password_hash, password)
    except (VerifyMismatchError, InvalidHashError):
        raise NotAllowed from None
    user.last_login_at = datetime.now(UTC)
    _, key = make_key(session, user, "session", EVERYTHING, timedelta(hours=SESSION_HOURS))
    return key


def make_key(
    session: Session, user: User, name: str, permissions: list[str], valid_for: timedelta | None = None
) -> tuple[ApiKey, str]:
    """What is kept of a person's new key, and the key itself, which is not."""
    key = secrets.token_urlsafe(32)
    kept = ApiKey(
        user_id=user.id,
        name=name,
        key_hash=_hash(key),
        permissions=list(permissions),
        usage_stats={},
        expires_at=datetime.now(UTC) + valid_for if valid_for else None,
    )
    session.add(kept)
    session.flush()
    return kept, key


def identify(session: Session, key: str, permission: str, endpoint: str) -> User:
    """Whose key this is; the call is counted. NotAllowed where it is revoked or expired, or does not permit this."""
    # Locked, or calls at the same moment would be counted once.
    found = session.scalars(
        select(ApiKey).where(ApiKey.key_hash == _hash(key), ApiKey.is_active).with_for_update()
    ).one_or_none()
    if found is None or (found.expires_at is not None and found.expires_at < datetime.now(UTC)):
        raise NotAllowed
    if permission not in found.permissions:
        raise NotAllowed
    usage = found.usage_stats if found.usage_stats is not None else {}
    usage[endpoint] = usage.get(endpoint, 0) + 1
    found.usage_stats = usage
    found.last_used_at = datetime.now(UTC)
    return session.get_one(User, found.user_id)


def _hash(key: str) -> str:
    # The key is random: nothing slower is needed to keep it from being guessed.
    return hashlib.sha256(key.encode()).hexdigest()
