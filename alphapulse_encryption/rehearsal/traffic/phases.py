"""The order of deployments: which phases of the application run during which stage.

As docs/application.md orders it ("The order of deployments and steps"). Old instances, which know nothing of the
encrypted columns, are in the phase ``off``, and plain SQL belongs to them. A stage begins with the deployment that is
named first, and what follows in it begins with the next; neighbouring phases run side by side, as they do while a
deployment is rolling.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from alphapulse_encryption.rehearsal.measures import Stage

OFF, PLAINTEXT, DUAL, ENCRYPTED = "off", "plaintext", "dual", "encrypted"

# For each stage its deployments, one after another; without any where there is no clone to talk to.
DEPLOYMENTS: Mapping[Stage, tuple[tuple[str, ...], ...]] = MappingProxyType(
    {
        Stage.CLONE: ((),),
        Stage.BASELINE: ((OFF,),),
        Stage.PREFLIGHT: ((OFF,),),
        # The columns are not there yet.
        Stage.COLUMNS: ((OFF,),),
        # What the old instances write is pending, and encrypted behind them.
        Stage.BACKFILL: ((OFF, PLAINTEXT),),
        # The last old instance is gone: from here on nothing becomes pending.
        Stage.INDEXES: ((PLAINTEXT,),),
        Stage.VERIFY: ((PLAINTEXT,),),
        Stage.VIEWS: ((PLAINTEXT, DUAL),),
        Stage.BACKUP: ((DUAL,),),
        # Ciphertext alone is refused before the switch.
        Stage.SWITCH: ((DUAL,), (DUAL, ENCRYPTED)),
        Stage.APPROVAL: ((ENCRYPTED,),),
        Stage.DROP: ((ENCRYPTED,),),
        Stage.ERASURE: ((ENCRYPTED,),),
        # Held before its end, until nobody writes ciphertext alone any more.
        Stage.RESTORE: ((ENCRYPTED,), (ENCRYPTED, DUAL), (DUAL,)),
        Stage.VERIFY_AGAIN: ((DUAL,),),
        Stage.AFTERWARDS: ((DUAL,), (PLAINTEXT,)),
        Stage.REMOVAL: ((),),
    }
)
