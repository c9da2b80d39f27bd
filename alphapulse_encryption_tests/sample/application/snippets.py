"""The guide's own code, as written but for the import path, in a process of the application. Prints what came of it.

python -m alphapulse_encryption_tests.sample.application.snippets NAME...
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

GUIDE = Path(__file__).with_name("guide.md")

# The import paths of the guide, and ours.
PATHS = {
    "from alpha_pulse.utils.encryption import": "from alphapulse_encryption import",
    "from alpha_pulse.config.database import": "from alphapulse_encryption.sample.application.database import",
    "from alpha_pulse.models.user_data import": "from alphapulse_encryption.sample.application.models import",
}


def blocks() -> dict[str, str]:
    """The guide's blocks of Python by name: the two halves of step 5, and the scripts by their file names."""
    step_5, *scripts = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    old, new = step_5.split("# New code")
    found = {"old": old, "new": new}
    for script in scripts:
        found[script.partition("\n")[0].removeprefix("# ").removesuffix(".py")] = script
    for theirs, ours in PATHS.items():
        found = {name: code.replace(theirs, ours) for name, code in found.items()}
    return found


def run(name: str) -> dict[str, Any]:
    """Run a block as a script of its own; what it prints, and whom it finds."""
    from alphapulse_encryption.sample.application.database import get_db_session
    from alphapulse_encryption.sample.application.models import User

    printed = io.StringIO()
    # What the blocks of step 5 have around them in the application.
    names: dict[str, Any] = {"session": get_db_session(), "User": User} if name in ("old", "new") else {}
    with contextlib.redirect_stdout(printed):
        exec(compile(blocks()[name], name, "exec"), names)
    user = names.get("user")
    return {
        "printed": printed.getvalue(),
        "found": None if user is None or name not in ("old", "new") else [user.id, user.email],
    }


if __name__ == "__main__":
    print(json.dumps({name: run(name) for name in sys.argv[1:]}))
