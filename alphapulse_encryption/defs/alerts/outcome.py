"""What a tick shows of a delivery."""

from __future__ import annotations

from collections.abc import Mapping


def outcome(results: Mapping[str, str | None], stands: str) -> str:
    """For a tick: who was told, and who was not.

    Args:
        results: by channel, why a message did not arrive; None where it did.
        stands: what the look found, in words.
    """
    told = [name for name, problem in results.items() if problem is None]
    missed = [f"{name} ({problem})" for name, problem in results.items() if problem is not None]
    parts = [stands[:1].upper() + stands[1:]]
    if missed:
        parts.append(f"NOT DELIVERED by {' and '.join(missed)}; tried again at the next tick")
    if told:
        parts.append(f"told by {' and '.join(told)}")
    if not results:
        parts.append("nothing new to tell")
    return "; ".join(parts) + "."
