"""Runs what the manual shows, as an operator does who follows it, on a database that the commands change."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from psycopg.conninfo import conninfo_to_dict

from alphapulse_encryption_tests.docs.pages import SHELL, Block, Page, commands
from alphapulse_encryption_tests.place import Place
from alphapulse_encryption_tests.test_backup import in_shell

OWN = ["python", "-m", "alphapulse_encryption"]
BACKUP = "backup.dump.age"
_EXPORT = re.compile(r"^export +(?P<name>[A-Z][A-Z0-9_]*)=")
_WATCH = re.compile(r"^watch +-n +\d+ +'(?P<command>[^']+)'$")
# What a shell does and `shlex` does not.
_SHELL_ONLY = re.compile(r"[|&;<>`$]|\$\(")


@dataclass(frozen=True)
class Own:
    """A command of ours, without anything that needs a shell.

    Args:
        variables: given before it.
        arguments: its own.
    """

    variables: dict[str, str]
    arguments: tuple[str, ...]

    @property
    def flags(self) -> frozenset[str]:
        return frozenset(argument for argument in self.arguments if argument.startswith("--"))


def own(command: str) -> Own | None:
    """What a command says to our program; None where it is another's, or one for a shell."""
    words = shlex.split(command, comments=True)
    variables = {}
    while words and re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", words[0], re.DOTALL):
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    if words[: len(OWN)] != OWN or _SHELL_ONLY.search(" ".join(shlex.split(command, comments=True))):
        return None
    return Own(variables, tuple(words[len(OWN) :]))


def plain(command: str) -> str:
    """A command without its comment."""
    return command if "\n" in command else re.sub(r"\s+# .*$", "", command).strip()


@dataclass
class Walk:
    """Follows pages.

    Args:
        place: the databases, and the environment, which commands change.
        directory: where the commands are given.
        addresses: what stands for the addresses of the manual.
        skipped: programs that are not here.
    """

    place: Place
    directory: Path
    addresses: dict[str, str]
    skipped: frozenset[str]
    done: list[str] = field(default_factory=list)
    flags: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._connect(self.place.url)

    def follow(self, page: Page, happens: Mapping[str, Callable[[], None]] | None = None) -> None:
        """Run all that the page shows, in its order.

        Args:
            page: the page.
            happens: what happens before the commands under a heading.
        """
        left = dict(happens or {})
        for block in page.blocks:
            if block.language in SHELL:
                left.pop(block.heading, lambda: None)()
                self._run_block(block)
        assert not left, f"{page.name} has no {', '.join(left)}"

    def _run_block(self, block: Block) -> None:
        if BACKUP in block.text:
            newest = max(
                (self.place.state / "backups").glob("*.dump.age"), key=lambda path: path.stat().st_mtime_ns
            )
            shutil.copy(newest, self.directory / BACKUP)
        for command in block.commands:
            if command.split()[0] not in self.skipped:
                self._run(command, str(block))
                self.done.append(plain(command))

    def _run(self, command: str, where: str) -> None:
        for shown, real in self.addresses.items():
            command = command.replace(shown, shlex.quote(real))
        if watched := _WATCH.match(command):
            command = watched["command"]
        ours = own(command)
        if ours is not None:
            done = self.place.run(*ours.arguments, **ours.variables)
            self.flags |= ours.flags
            if ours.arguments == ("--sign-saved", "show"):
                # It ends with the command that signs, and its status says that there is something to sign.
                self.addresses["DIGEST"] = done.stdout.split()[-1]
                done.returncode -= 1
        elif exported := _EXPORT.match(command):
            done = in_shell(self.place, self.directory, f'{command}\nprintf %s "${exported["name"]}"')
            assert done.stdout, f"{where}: {command} sets nothing"
            self.place.extra[exported["name"]] = done.stdout
            if exported["name"] == "ALPHAPULSE_DATABASE_URL":
                self._connect(done.stdout)
        else:
            done = in_shell(self.place, self.directory, command)
            for part in re.split(r"[|&;>]", command):
                inner = own(part)
                self.flags |= inner.flags if inner is not None else set()
        assert (done.returncode, done.stderr) == (0, ""), f"{where}: {command}\n{done.stdout}\n{done.stderr}"

    def _connect(self, url: str) -> None:
        # What psql without options goes to.
        self.place.extra["PGDATABASE"] = str(conninfo_to_dict(url)["dbname"])


def own_commands(text: str) -> list[Own]:
    """Every command of ours in a shell's text, those within pipes and redirections included."""
    found = []
    for command in commands(text):
        whole = own(command)
        parts = [command] if whole is not None else re.split(r"[|&;>]", command)
        found += [ours for part in parts if OWN[2] in part and (ours := _own_or_none(part)) is not None]
    return found


def _own_or_none(part: str) -> Own | None:
    try:
        return own(part)
    except ValueError:
        # A part of a quotation.
        return None
