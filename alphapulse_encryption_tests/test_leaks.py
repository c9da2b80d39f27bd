"""What looks for leaks finds them: each form of a secret, in each kind of place, at each position."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import psycopg
import pytest

from alphapulse_encryption_tests import canaries, leaks
from alphapulse_encryption_tests.leaks import Find, Processes, Scanner
from alphapulse_encryption_tests.migration import support

# Whatever is to be escaped is in it, in one form or the other.
KEY = bytes([0, 10, 34, 39, 92, 127, 128, 200, 251, 240, 255, 62, 63, 190, 251, 255, *range(7, 23)])
TEXT = 'Größe "2"/\\ of 漢'
SHORT = "+49 151"
SCANNER = Scanner({"key": KEY, "text": TEXT, "short": SHORT})


def forms_written_down() -> dict[str, bytes]:
    """The forms as a programmer would write the secret, without the module that is tested."""
    standard = base64.b64encode(KEY)
    return {
        "raw": KEY,
        "base64": standard,
        "base64 without padding": standard.rstrip(b"="),
        "URL-safe base64": base64.urlsafe_b64encode(KEY),
        "URL-safe base64 without padding": base64.urlsafe_b64encode(KEY).rstrip(b"="),
        "hex": KEY.hex().encode(),
        "HEX": KEY.hex().upper().encode(),
        "repr": repr(KEY).encode(),
        "repr of an array": repr(bytearray(KEY)).encode(),
        "repr of the text": repr(standard.decode()).encode(),
        "JSON of the text": json.dumps({"key": standard.decode()}).encode(),
        "JSON of the bytes": json.dumps(KEY.decode("latin-1")).encode(),
        "list": repr(list(KEY)).encode(),
        "behind one": base64.b64encode(b"-" + KEY + b"behind"),
        "behind two": base64.b64encode(b"--" + KEY + b"behind"),
        "behind three": base64.b64encode(b"---" + KEY + b"behind"),
        "URL-safe, behind one": base64.urlsafe_b64encode(b"-" + KEY + b"behind"),
        "URL-safe, behind two": base64.urlsafe_b64encode(b"--" + KEY),
        "base64 of base64": base64.b64encode(b"key=" + standard),
        "base64 of URL-safe base64": base64.b64encode(b"key: " + base64.urlsafe_b64encode(KEY)),
        "hex of base64": standard.hex().encode(),
        "text": TEXT.encode(),
        "text in JSON": json.dumps({"a": TEXT}).encode(),
        "text in UTF-8 JSON": json.dumps({"a": TEXT}, ensure_ascii=False).encode(),
        "text in repr": repr([TEXT]).encode(),
        "text in hex": TEXT.encode().hex().encode(),
        "text in base64": base64.b64encode(f"a {TEXT} b".encode()),
        "short text": b"call +49 151 now",
    }


FORMS = forms_written_down()
PYTHON = Path(sys.executable).name


def only(processes: Processes, pid: int) -> Processes:
    """What was seen of one of them."""
    found = Processes()
    found.seen = {seen for seen in processes.seen if seen.pid == pid}
    return found


def secret_of(form: str) -> str:
    return "short" if form == "short text" else "text" if form.startswith("text") else "key"


def secrets(found: list[Find]) -> set[str]:
    return {find.secret for find in found}


def test_every_form_in_bytes_at_every_position() -> None:
    for form, data in FORMS.items():
        for before in range(20):
            for behind in (0, 3, 9):
                found = SCANNER.data(b"." * before + data + b"." * behind, "here")
                assert secrets(found) == {secret_of(form)}, (form, before, behind)
                assert {find.place for find in found} == {"here"}


def test_a_secret_that_is_not_there() -> None:
    other = bytes([*KEY[:-1], KEY[-1] ^ 1])
    for data in (b"", b"x", bytes(1000), other * 3, base64.b64encode(os.urandom(50_000)), KEY[:-1], KEY[1:]):
        assert SCANNER.data(data, "here") == []


def test_in_files(tmp_path: Path) -> None:
    (tmp_path / "clean").write_bytes(os.urandom(100_000))
    assert SCANNER.files(tmp_path) == []
    for number, (form, data) in enumerate(FORMS.items()):
        path = tmp_path / "deeper" / str(number)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(os.urandom(10_000 + number) + data + os.urandom(100))
        assert secrets(SCANNER.files(tmp_path)) == {secret_of(form)}, form
        assert SCANNER.files(tmp_path, leave_out=[path]) == []
        path.write_bytes(zlib.compress(data * 3))
        assert secrets(SCANNER.files(tmp_path)) == {secret_of(form)}, form
        path.unlink()
    (tmp_path / KEY.hex()).touch()
    assert {find.place for find in SCANNER.files(tmp_path)} == {f"name of {tmp_path / KEY.hex()}"}
    with pytest.raises(AssertionError, match="no file"):
        SCANNER.files(tmp_path / "deeper")


def test_in_a_database(database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA elsewhere")
        connection.execute(
            'CREATE TABLE elsewhere."A table" (id int, words text, "raw bytes" bytea, tags text[], data jsonb)'
        )
        assert SCANNER.database(database_url) == []
        for form, data in FORMS.items():
            text = data.decode("latin-1").replace("\0", "") if form == "raw" else data.decode()
            for column, value in {
                "words": None if form == "raw" else f"before {text} behind",
                "raw bytes": b"before" + data,
                "tags": None if form == "raw" else ["a", f"b {text}"],
                "data": None if form == "raw" else json.dumps({"b": [f"c {text}"]}),
                "raw bytes, packed": zlib.compress(b"before" + data),
            }.items():
                if value is None:
                    continue
                name = column.removesuffix(", packed")
                connection.execute(
                    f'INSERT INTO elsewhere."A table" ("{name}") VALUES (%s)'.encode(), [value]
                )
                found = SCANNER.database(database_url)
                assert secrets(found) == {secret_of(form)}, (form, column)
                assert {find.place.removesuffix(", uncompressed") for find in found} == {
                    f"column elsewhere.A table.{name}"
                }
                connection.execute('TRUNCATE elsewhere."A table"')


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="there is no /proc here")
def test_in_processes() -> None:
    program = [sys.executable, "-c", "input()"]
    texts = {form: data.decode() for form, data in FORMS.items() if form != "raw"}
    running = []
    with Processes() as processes:
        for form, text in texts.items():
            running.append(subprocess.Popen([*program, text], stdin=subprocess.PIPE))
            running.append(
                subprocess.Popen(program, stdin=subprocess.PIPE, env={**os.environ, f"OF_{form}": text})
            )
        wanted = {process.pid for process in running}
        support.until(
            lambda: wanted <= {seen.pid for seen in processes.seen.copy() if "input()" in seen.command},
            "all are seen",
        )
        for process in running:
            process.communicate(b"\n")
    for number, form in enumerate(texts):
        named, given = running[2 * number].pid, running[2 * number + 1].pid
        assert secrets(list(only(processes, named).with_secrets(SCANNER))) == {secret_of(form)}, form
        assert secrets(list(only(processes, given).with_secrets(SCANNER))) == set()
        assert secrets(list(only(processes, given).that_were_given(SCANNER, [PYTHON]))) == {
            secret_of(form)
        }, form
    assert secrets(list(processes.with_secrets(SCANNER))) == {"key", "text", "short"}
    assert secrets(list(processes.that_were_given(SCANNER, [PYTHON]))) == {"key", "text", "short"}
    assert list(processes.that_were_given(SCANNER, ["another"])) == []


def test_what_is_found_shows_no_secret() -> None:
    (find, *_) = SCANNER.data(KEY, "here")
    assert find == Find("key", "raw", "here")
    assert {needle.form for needle in leaks.needles({"key": KEY})} >= {"raw", "hex", "base64", "repr"}


def test_a_file_that_grows_is_looked_through_where_it_is_new(tmp_path: Path) -> None:
    """What a secret begins with may have been there at the last look; what was there may have become another thing."""
    log, other = tmp_path / "log", tmp_path / "other"
    scanner = Scanner({"appended": "cnry-appended-to-it", "replaced": "cnry-replaced-in-it"})
    nowhere = tmp_path / "no server"
    with canaries.Watch(f"postgresql:///?host={nowhere}", scanner, [tmp_path], nowhere) as watch:
        for path, first, rest in (
            (log, "a line\n" * 9_000 + "cnry-app", "ended-to-it"),
            (other, "x" * 40_000, ""),
        ):
            path.write_text(first)
            support.until(lambda path=path: path in watch.files, "the file is seen")  # type: ignore[misc]
            with path.open("r+") as file:
                if rest:
                    file.seek(0, 2)
                    file.write(rest)
                else:
                    file.write("cnry-replaced-in-it")
                    file.seek(0, 2)
                    file.write("more")
        support.until(lambda: len({find.secret for find in watch.found()}) == 2, "both are found")
    assert {(find.secret, find.place) for find in watch.found()} == {
        ("appended", f"file {log}"),
        ("replaced", f"file {other}"),
    }
