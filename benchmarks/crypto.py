"""What the ciphers cost beside the bare primitives, and how long importing them takes.

    python benchmarks/crypto.py [--check]

Bare is what no library can leave out: an IV from the operating system, one call of AESGCM, base64, UTF-8. Bare and
library take turns in one process over several rounds, on values as long as an e-mail address; each round's ratio
counts, and the median is shown. The import is timed in fresh processes, less the time that an empty one takes.

With --check the exit status is 1 if a requirement is not met.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from base64 import b64decode, b64encode
from collections.abc import Callable

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from rich.console import Console
from rich.table import Table

from alphapulse_encryption.crypto.cipher import FieldCipher
from alphapulse_encryption.crypto.envelope import AES_256_GCM, get_format
from alphapulse_encryption.crypto.keys import KeyRing

MOST_TIMES_BARE = 2.5
MOST_TIMES_BARE_IN_BATCHES = 1.5
MOST_IMPORT_MILLISECONDS = 150

VALUES = 20_000
ROUNDS = 15
PROCESSES = 15

KEYS = KeyRing({1: bytes(range(32))}, 1)
CONTEXT = "user_pii"
AEAD = AESGCM(KEYS.derive(CONTEXT, 1))
CIPHER = FieldCipher(get_format(AES_256_GCM, KEYS))


def bare_encrypt(value: str) -> str:
    iv = os.urandom(12)
    return b64encode(iv + AEAD.encrypt(iv, value.encode(), None)).decode()


def bare_decrypt(sealed: str) -> str:
    payload = b64decode(sealed)
    return AEAD.decrypt(payload[:12], payload[12:], None).decode()


def seconds(work: Callable[[], object]) -> float:
    """Processor time, so that what else the machine does counts little."""
    started = time.process_time()
    work()
    return time.process_time() - started


def measure() -> list[tuple[str, float, float, float]]:
    """What is done, microseconds for a value by the library and bare, and the limit on their ratio."""
    values = [f"user{number:06}@example.com" for number in range(VALUES)]
    sealed = [bare_encrypt(value) for value in values]
    envelopes = [CIPHER.encrypt(value, CONTEXT) for value in values]
    contests: list[tuple[str, Callable[[], object], Callable[[], object], float]] = [
        (
            "encrypt one",
            lambda: [CIPHER.encrypt(value, CONTEXT) for value in values],
            lambda: [bare_encrypt(value) for value in values],
            MOST_TIMES_BARE,
        ),
        (
            "decrypt one",
            lambda: [CIPHER.decrypt(envelope, CONTEXT) for envelope in envelopes],
            lambda: [bare_decrypt(text) for text in sealed],
            MOST_TIMES_BARE,
        ),
        (
            "encrypt many",
            lambda: CIPHER.encrypt_many(values, CONTEXT),
            lambda: [bare_encrypt(value) for value in values],
            MOST_TIMES_BARE_IN_BATCHES,
        ),
        (
            "decrypt many",
            lambda: CIPHER.decrypt_many(envelopes, CONTEXT),
            lambda: [bare_decrypt(text) for text in sealed],
            MOST_TIMES_BARE_IN_BATCHES,
        ),
    ]
    measured = []
    for name, library, bare, limit in contests:
        rounds = [(seconds(library), seconds(bare)) for _ in range(ROUNDS)]
        ratio = statistics.median(ours / theirs for ours, theirs in rounds)
        ours = statistics.median(ours for ours, _ in rounds) / VALUES * 1e6
        measured.append((name, ours, ratio, limit))
    return measured


def import_milliseconds() -> float:
    """Of `import alphapulse_encryption` in a fresh process, beyond what the interpreter takes."""

    def run(statement: str) -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", statement], check=True)
        return time.perf_counter() - started

    pairs = [(run("import alphapulse_encryption"), run("pass")) for _ in range(PROCESSES)]
    return statistics.median(loaded - empty for loaded, empty in pairs) * 1000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit status 1 if a requirement is not met")
    options = parser.parse_args()
    table = Table("", "µs a value", "times bare", "at most")
    measured = measure()
    for name, microseconds, ratio, limit in measured:
        table.add_row(name, f"{microseconds:.2f}", f"{ratio:.2f}", f"{limit}")
    milliseconds = import_milliseconds()
    console = Console()
    console.print(table)
    console.print(f"import alphapulse_encryption: {milliseconds:.0f} ms, at most {MOST_IMPORT_MILLISECONDS}")
    met = milliseconds <= MOST_IMPORT_MILLISECONDS and all(ratio <= limit for _, _, ratio, limit in measured)
    return 1 if options.check and not met else 0


if __name__ == "__main__":
    sys.exit(main())
