"""Known faults of PostgreSQL by which others get further than their rights: where each is mended, what it means here.

From the advisories at https://www.postgresql.org/support/security/, of the versions that this package works with. What
concerns neither a dump, nor a restore, nor the code of a dump is not listed.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """A fault of a program or a server.

    Args:
        mended: in these minor versions, and in each major version above the highest one.
        meaning: what somebody gets by it.
    """

    name: str
    mended: str
    meaning: str

    def in_version(self, version: tuple[int, int]) -> bool:
        """Whether a version, major and minor, has it."""
        pairs = (each.split(".") for each in self.mended.split())
        minors = {int(major): int(minor) for major, minor in pairs}
        return version[0] <= max(minors) and version[1] < minors.get(version[0], version[1] + 1)


# pg_dump, pg_restore, and libpq, which our own sessions use as well.
OF_CLIENTS = (
    Fault(
        "CVE-2024-7348",
        "16.4 15.8 14.13",
        "who owns tables can have SQL run as the role that dumps, the server mended too",
    ),
    Fault("CVE-2025-1094", "17.3 16.7 15.11 14.16", "text in an invalid encoding gets out of its quotes"),
    Fault(
        "CVE-2025-8714 and CVE-2025-8715",
        "17.6 16.10 15.14 14.19",
        "who names objects can run programs of the person who restores a plain script made from a backup",
    ),
    Fault("CVE-2025-12818", "18.1 17.7 16.11 15.15 14.20", "large input crashes the client"),
    Fault("CVE-2026-6477", "18.4 17.10 16.14 15.18 14.23", "a server can write into the memory of pg_dump"),
)
# By which who may run SQL, as a dump's code does in a restore drill and in a rehearsal, gets the server.
OF_SERVERS = (
    Fault("CVE-2023-2454", "15.3 14.8", "who may create schemas becomes superuser"),
    Fault("CVE-2023-5869", "16.1 15.5 14.10", "who may run SQL gets a shell on the server"),
    Fault("CVE-2024-10979", "17.1 16.5 15.9 14.14", "who may use PL/Perl gets a shell on the server"),
    Fault("CVE-2026-6473", "18.4 17.10 16.14 15.18 14.23", "who may run SQL gets a shell on the server"),
    Fault("CVE-2026-120141", "18.7 17.12 16.16 15.20 14.25", "who may run SQL gets a shell on the server"),
)


def told(faults: tuple[Fault, ...], version: tuple[int, int]) -> str:
    """The faults that a version has, in words; empty where it has none that is known."""
    found = []
    for fault in faults:
        if fault.in_version(version):
            minor = next(
                (m for m in fault.mended.split() if m.startswith(f"{version[0]}.")), "no minor of it"
            )
            found.append(f"{fault.name} ({fault.meaning}; mended in {minor})")
    return "; ".join(found)


def split(number: int) -> tuple[int, int]:
    """Major and minor of a version as the server and libpq number it: 180006 is 18.6."""
    return number // 10_000, number % 10_000
