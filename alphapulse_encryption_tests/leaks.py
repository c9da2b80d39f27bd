"""Looks for secrets where they must not be: in bytes, files, databases and processes, in any of their usual forms.

A secret is looked for as it is and in the encodings that logs, JSON, URLs, databases and dumps use; base64 also in
the midst of a longer text, where it depends on what stands before it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import threading
import zlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
import psycopg
from psycopg.sql import SQL, Identifier

# A needle so long has a whole word of eight bytes in it, wherever in a file it begins.
_SHORTEST = 15
_WORD = 8
_FILTER_BITS = 20
_NESTED = 4
_ESCAPED = re.compile(rb'\\(["\\])')
_SECONDS_BETWEEN_LOOKS = 0.03
_LOOKS_AT_A_NEW_ONE = 10
_LOOKS_BETWEEN = 20
_PATIENCE = 240.0


@dataclass(frozen=True)
class Needle:
    """One form of a secret.

    Args:
        secret: its name.
        form: name of the form.
        data: its bytes.
    """

    secret: str
    form: str
    data: bytes


@dataclass(frozen=True)
class Find:
    """Where a needle was found; shows no secret."""

    secret: str
    form: str
    place: str


def forms_of_bytes(secret: bytes) -> dict[str, bytes]:
    """The forms in which bytes, such as a key, may appear."""
    standard = base64.b64encode(secret)
    latin = secret.decode("latin-1")
    forms = {
        "raw": secret,
        "hex": secret.hex().encode(),
        "HEX": secret.hex().upper().encode(),
        "base64": standard.rstrip(b"="),
        "base64, in a URL": quote(standard.rstrip(b"="), safe="").encode(),
        "base64, in JSON with escaped slashes": standard.rstrip(b"=").replace(b"/", b"\\/"),
        "base64, URL-safe": base64.urlsafe_b64encode(secret).rstrip(b"="),
        "repr": repr(secret)[2:-1].encode(),
        "JSON": json.dumps(latin)[1:-1].encode(),
        "JSON, not in ASCII": json.dumps(latin, ensure_ascii=False)[1:-1].encode(),
        "text in UTF-8": latin.encode(),
        "list of numbers": ", ".join(map(str, secret)).encode(),
        "list of numbers, without blanks": ",".join(map(str, secret)).encode(),
    }
    return forms | _aligned(secret)


def forms_of_text(secret: str) -> dict[str, bytes]:
    """The forms in which text, such as a value or a key's base64 text, may appear."""
    data = secret.encode()
    forms = {
        "text": data,
        "text in hex": data.hex().encode(),
        "text in HEX": data.hex().upper().encode(),
        "text in JSON": json.dumps(secret)[1:-1].encode(),
        "text in JSON, not in ASCII": json.dumps(secret, ensure_ascii=False)[1:-1].encode(),
        "text in a URL": quote(secret, safe="").encode(),
        "text in repr": repr(secret)[1:-1].encode(),
        "text in UTF-16": secret.encode("utf-16-le"),
    }
    return forms | {f"text in {form}": part for form, part in _aligned(data).items()}


def _aligned(data: bytes) -> dict[str, bytes]:
    """What base64 always has of some bytes, by what their position in a longer text leaves when divided by three."""
    forms = {}
    for before in range(3):
        first, end = -(-before * 8 // 6), (before + len(data)) * 8 // 6
        for name, alphabet in (("base64", b"+/"), ("base64, URL-safe", b"-_")):
            text = base64.b64encode(bytes(before) + data, alphabet)
            forms[f"{name}, behind {before}"] = text[first:end]
    return forms


def needles(secrets: Mapping[str, bytes | str]) -> list[Needle]:
    """Every form of every secret; of one that is bytes also those of its base64 texts."""
    found: dict[bytes, Needle] = {}
    for name, secret in secrets.items():
        forms = forms_of_text(secret) if isinstance(secret, str) else forms_of_bytes(secret)
        if isinstance(secret, bytes):
            for encode in (base64.b64encode, base64.urlsafe_b64encode):
                for form, data in forms_of_text(encode(secret).decode().rstrip("=")).items():
                    forms[f"{encode.__name__}, as {form}"] = data
        for form, data in forms.items():
            found.setdefault(data, Needle(name, form, data))
    return list(found.values())


class Scanner:
    """Finds needles, many at once.

    Args:
        secrets: what must not be found, by name.
    """

    def __init__(self, secrets: Mapping[str, bytes | str]) -> None:
        self.needles = needles(secrets)
        self._short = [needle for needle in self.needles if len(needle.data) < _SHORTEST]
        # Of any run of fifteen bytes, eight words could be the one that lies on a multiple of eight.
        by_word: dict[int, list[tuple[int, Needle]]] = defaultdict(list)
        for needle in self.needles:
            if len(needle.data) >= _SHORTEST:
                for at in range(_WORD):
                    word = int.from_bytes(needle.data[at : at + _WORD], "little")
                    by_word[word].append((at, needle))
        self._by_word = dict(by_word)
        self._filter = np.zeros(1 << _FILTER_BITS, dtype=np.bool_)
        self._filter[self._slots(np.array(list(by_word), dtype=np.uint64))] = True

    def data(self, data: bytes, place: str) -> list[Find]:
        """What is found in bytes; where they are text, escaped once more or several times, as JSON within JSON is."""
        found: dict[tuple[str, str], Find] = {}
        for _ in range(_NESTED):
            for needle in self._in(data):
                found.setdefault((needle.secret, needle.form), Find(needle.secret, needle.form, place))
            if b"\\" not in data or b"\0" in data:
                break
            data = _ESCAPED.sub(rb"\1", data)
        return list(found.values())

    def _in(self, data: bytes) -> Iterator[Needle]:
        yield from (needle for needle in self._short if needle.data in data)
        if len(data) < _SHORTEST:
            return
        words = np.frombuffer(data, dtype="<u8", count=len(data) // _WORD)
        for position in np.flatnonzero(self._filter[self._slots(words)]).tolist():
            for at, needle in self._by_word.get(int(words[position]), ()):
                begin = position * _WORD - at
                if begin >= 0 and data.startswith(needle.data, begin):
                    yield needle

    @staticmethod
    def _slots(
        words: np.ndarray[tuple[int], np.dtype[np.uint64]],
    ) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        # Multiplying spreads texts, whose bytes are alike, over all slots (Fibonacci hashing).
        return (words * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - _FILTER_BITS)

    def text(self, text: str, place: str) -> list[Find]:
        """What is found in text."""
        return self.data(text.encode("utf-8", "surrogatepass"), place)

    def files(self, root: Path, *, leave_out: Collection[Path] = ()) -> list[Find]:
        """What is found in the files below a directory, their names included."""
        found: list[Find] = []
        looked = 0
        for path in sorted(root.rglob("*")):
            found += self.data(os.fsencode(path), f"name of {path}")
            if path in leave_out or path.is_symlink() or not path.is_file():
                continue
            # One that goes away meanwhile holds nothing.
            with contextlib.suppress(FileNotFoundError):
                content = path.read_bytes()
                looked += 1
                found += self.data(content, str(path))
                found += self._unpacked(content, str(path))
        assert looked, f"there is no file in {root}"
        return found

    def database(self, url: str) -> list[Find]:
        """What is found in the values of every column of every table but the server's own; bytea as bytes, too.

        Values that were compressed with zlib, as Dagster's are, are looked at as they were before.
        """
        found: list[Find] = []
        with psycopg.connect(url) as connection:
            columns = connection.execute(
                "SELECT n.nspname, c.relname, a.attname FROM pg_attribute a "
                "JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace "
                "WHERE c.relkind IN ('r', 'm') AND a.attnum > 0 AND NOT a.attisdropped "
                "AND n.nspname NOT IN ('pg_catalog', 'information_schema') AND n.nspname !~ '^pg_t' "
                "ORDER BY 1, 2, a.attnum"
            ).fetchall()
            assert columns, "there is no table"
            for schema, table, column in columns:
                place = f"column {schema}.{table}.{column}"
                wanted = SQL("SELECT {} FROM {}").format(Identifier(column), Identifier(schema, table))
                for form in ("text", "binary"):
                    query = SQL("COPY ({}) TO STDOUT (FORMAT {})").format(wanted, SQL(form))
                    with connection.cursor() as cursor, cursor.copy(query) as copy:
                        found += self.data(b"".join(bytes(part) for part in copy), place)
                for (value,) in connection.execute(wanted):
                    if isinstance(value, bytes):
                        found += self._unpacked(value, place)
        return sorted(set(found), key=repr)

    def _unpacked(self, data: bytes, place: str) -> list[Find]:
        if data[:1] != b"\x78":
            return []
        try:
            return self.data(zlib.decompress(data), f"{place}, uncompressed")
        except zlib.error:
            return []


@dataclass(frozen=True)
class Seen:
    """A process that was there.

    Args:
        pid: its number.
        command: its command line.
        environment: as it was given to it; None where it is somebody else's.
    """

    pid: int
    command: tuple[str, ...]
    environment: bytes | None

    @property
    def program(self) -> str:
        """The name of its program, as far as the command line tells: servers put what they do there."""
        return Path(self.command[0].split(":")[0]).name if self.command else ""


class Processes:
    """Every process that begins while the ``with`` block runs, looked at again and again (Linux).

    What was there before has never heard of the secrets, and the kernel may make a reader of it wait.
    """

    def __init__(self) -> None:
        self.seen: set[Seen] = set()
        self._others: set[int] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="looks at processes", daemon=True)

    def __enter__(self) -> Processes:
        self._others = _pids() - {os.getpid()}
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(_PATIENCE)
        assert not self._thread.is_alive(), "looking at processes hangs"

    def _watch(self) -> None:
        others = self._others
        looked_at: dict[int, int] = {}
        known: set[tuple[int, bytes]] = set()
        while not self._ended.wait(_SECONDS_BETWEEN_LOOKS):
            pids = _pids()
            # A number that was given back may come again.
            others = others & pids
            looked_at = {pid: looked_at.get(pid, 0) + 1 for pid in pids - others}
            for pid, times in looked_at.items():
                # Most become another program soon after they begin, or never.
                if times > _LOOKS_AT_A_NEW_ONE and times % _LOOKS_BETWEEN:
                    continue
                with contextlib.suppress(OSError):
                    command = Path(f"/proc/{pid}/cmdline").read_bytes()
                    if command and (pid, command) not in known:
                        known.add((pid, command))
                        parts = command.rstrip(b"\0").split(b"\0")
                        self.seen.add(Seen(pid, tuple(map(os.fsdecode, parts)), _environment(pid)))

    def with_secrets(self, scanner: Scanner) -> Iterator[Find]:
        """What is found in command lines."""
        for seen in self.seen:
            yield from scanner.data(
                b"\0".join(os.fsencode(part) for part in seen.command), f"command line of {seen.program}"
            )

    def that_were_given(self, scanner: Scanner, programs: Iterable[str]) -> Iterator[Find]:
        """What is found in the environment of some programs, by their names."""
        for seen in self.seen:
            if seen.program in set(programs):
                yield from scanner.data(seen.environment or b"", f"environment of {seen.program}")


def _pids() -> set[int]:
    return {int(name) for name in os.listdir("/proc") if name.isdecimal()}


def _environment(pid: int) -> bytes | None:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return None
