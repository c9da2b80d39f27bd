"""`make audit`: locked dependencies with known faults; their versions and dates where nobody can be asked."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LOCKS = ("requirements.lock", "deploy/docker/requirements.lock")
# What is pinned is what is asked for: nothing is resolved or installed.
_ASK = ("--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json")
_PINNED = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^ ;\\]+)")


def faults(report: Any) -> list[str]:
    """What pip-audit found, in a line each."""
    return [
        f"{one['name']} {one['version']}: {fault['id']}, mended in {', '.join(fault['fix_versions']) or 'no version'}"
        for one in report["dependencies"]
        for fault in one.get("vulns", ())
    ]


def asked(report: Any) -> int:
    """Of how many dependencies pip-audit could find out anything."""
    return sum("skip_reason" not in one for one in report["dependencies"])


def locked(path: Path) -> list[tuple[str, str, str]]:
    """Name, version, and the day on which that version came into the lock, by what `git blame` tells."""
    blame = subprocess.run(
        ["git", "blame", "--line-porcelain", "--", path.name],
        cwd=path.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = blame.stdout.splitlines() or [f"\t{line}" for line in path.read_text().splitlines()]
    found, day = [], "not known"
    for line in lines:
        if line.startswith("committer-time "):
            day = f"{datetime.fromtimestamp(int(line.split()[1]), UTC):%Y-%m-%d}"
        elif line.startswith("\t") and (pin := _PINNED.match(line[1:])):
            found.append((pin[1], pin[2], day))
    return found


def main() -> int:
    """0: no known fault, or nobody to ask; 1: some."""
    wrong: list[str] = []
    for name in LOCKS:
        path = ROOT / name
        done = subprocess.run(
            [Path(sys.executable).with_name("pip-audit"), *_ASK, "--requirement", path],
            capture_output=True,
            text=True,
            check=False,
        )
        report = json.loads(done.stdout) if done.stdout.startswith("{") else {"dependencies": []}
        known = locked(path)
        if not asked(report):
            print(
                f"{name}: nobody to ask about known faults. Run this again where PyPI can be reached. Versions:"
            )
            for package, version, day in known:
                print(f"  {package:<32}{version:<16}locked {day}")
            continue
        found = faults(report)
        wrong += found
        print(f"{name}: {asked(report)} of {len(known)} looked up, {len(found)} known faults")
        for line in found:
            print(f"  {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
