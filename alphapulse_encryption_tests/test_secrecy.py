"""What children, terminals and logs get to see of secrets: what programs were really given is read from the kernel."""

from __future__ import annotations

import ast
import base64
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import alphapulse_encryption
from alphapulse_encryption import secrecy
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests import forked
from alphapulse_encryption_tests.leaks import Scanner
from alphapulse_encryption_tests.migration import walk
from alphapulse_encryption_tests.migration.gates.test_drill import backup_with_drill, programs

KEYS = {
    "ALPHAPULSE_ENCRYPTION_MASTER_KEY": bytes(range(1, 33)),
    "ALPHAPULSE_ENCRYPTION_MASTER_KEY_V2": bytes(range(2, 34)),
}
SECRETS: dict[str, str] = {
    **{name: base64.b64encode(key).decode() for name, key in KEYS.items()},
    "AWS_SECRET_ACCESS_KEY": "canary-of-AWS-4d7f1c09b2e8",
    "AWS_SESSION_TOKEN": "canary-of-AWS-s-8b1e66f03a9d",
    "VAULT_TOKEN": "hvs.canary-of-Vault-5a1c7e03d9",
    "VAULT_SECRET_ID": "canary-of-a-role-77d1e0",
    "ALPHAPULSE_ALERT_WEBHOOK_URL": "https://hooks.example.com/canary-of-a-webhook-2f6b",
    "ALPHAPULSE_SMTP_URL": "smtps://alerts:canary-of-a-mailbox-90ae@mail.example.com",
}
SCANNER = Scanner({**SECRETS, **KEYS})

of_children = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="there is no /proc here")


def test_the_scanner_would_find_them() -> None:
    environment = "\0".join(f"{name}={text}" for name, text in SECRETS.items())
    assert {find.secret for find in SCANNER.text(environment, "here")} == set(SECRETS)


@of_children
def test_backup_and_restore_drill(
    sample_url: str, postgres: EmbeddedPostgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in SECRETS.items():
        monkeypatch.setenv(name, text)
    given = tmp_path / "given"
    given.mkdir()
    walk.encrypt(sample_url, walk.CATALOGUE.table("users"))
    wrapped = programs(postgres, tmp_path / "bin")
    for program in wrapped.iterdir():
        # Told from within, by the process that then becomes the program.
        lines = program.read_text().splitlines(keepends=True)
        record = f'cat /proc/$$/environ /proc/$$/cmdline > "{given}/{program.name}-$1-$$"\n'
        program.write_text("".join([lines[0], record, *lines[1:]]))
    assert backup_with_drill(sample_url, tmp_path / "backups", wrapped).drill is not None

    called = sorted(path.name.rpartition("-")[0] for path in given.iterdir())
    assert [name for name in called if name.endswith("--version")] == [
        "pg_dump---version",
        "pg_restore---version",
    ]
    assert "pg_restore---list" in called
    assert len(called) == 5, called
    assert SCANNER.files(given) == []
    assert all(b"PATH=" in path.read_bytes() for path in given.iterdir())


@of_children
def test_psql_and_the_embedded_server(server_dir: Path) -> None:
    """Both started by one command, as ``make psql`` does."""
    state = server_dir.parent
    outputs = {"psql": state / "of-psql", "server": state / "of-server"}
    postmaster = f"$(head -1 {server_dir}/cluster/postmaster.pid)"
    server_dir.parent.chmod(0o755)
    done = forked.run(
        "alphapulse_encryption.sample.postgres",
        [
            "psql",
            *("-c", f"\\! cat /proc/$PPID/environ /proc/$PPID/cmdline > {outputs['psql']}"),
            *("-c", f"\\! cat /proc/{postmaster}/environ > {outputs['server']}"),
        ],
        {
            "PATH": "/usr/bin:/bin:/usr/sbin:/sbin",
            "ALPHAPULSE_STATE_DIR": str(state),
            "PAGER": "cat",
            **SECRETS,
        },
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    assert b"PAGER=cat" in outputs["psql"].read_bytes(), "what a person set for psql reaches it"
    for name, path in outputs.items():
        assert b"PATH=" in path.read_bytes()
        assert SCANNER.data(path.read_bytes(), name) == []


@of_children
def test_the_search_for_fonts(tmp_path: Path) -> None:
    """Matplotlib's, at its first use on a machine."""
    program = tmp_path / "bin" / "fc-list"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\ncat /proc/$$/environ > "{tmp_path}/given"\necho --format\n')
    program.chmod(0o755)
    environment = {"PATH": f"{program.parent}:/usr/bin:/bin", "HOME": str(tmp_path), **SECRETS}
    load = "import matplotlib.backends.backend_agg, matplotlib.font_manager"
    for first in ("from alphapulse_encryption.secrecy import find_fonts; find_fonts()", "pass"):
        done = subprocess.run(
            [sys.executable, "-c", f"{first}; {load}"], env=environment, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr
        found = SCANNER.data((tmp_path / "given").read_bytes(), "fc-list")
        assert bool(found) == (first == "pass"), "by itself it gets all of it"
        shutil.rmtree(tmp_path / ".cache")


@of_children
def test_what_a_program_starts_has_no_key_and_can_ask_for_it(tmp_path: Path) -> None:
    """Under any parent: here a shell that nobody gave an environment of its own, and a child of ours below it."""
    kept = (
        "ALPHAPULSE_ENCRYPTION_MASTER_KEY",
        "ALPHAPULSE_ENCRYPTION_MASTER_KEY_V2",
        "VAULT_TOKEN",
        "VAULT_SECRET_ID",
    )
    environment = {**SECRETS, "PATH": os.environ["PATH"], "ALPHAPULSE_ENCRYPTION_KEY_VERSION": "2"}
    ask = f"import secrecy_child; secrecy_child.tell({str(tmp_path / 'below')!r})"
    shell = f'cat /proc/$$/environ > "{tmp_path}/given"; {sys.executable} -c "{ask}"'
    (tmp_path / "secrecy_child.py").write_text(
        "from pathlib import Path\n"
        "from alphapulse_encryption import encrypt_field, secrecy\n"
        "def tell(path):\n"
        f"    found = [secrecy.with_keys()[name] for name in {kept!r}]\n"
        "    ring = encrypt_field('x', 'user_pii')\n"
        "    Path(path).write_text(repr((found, Path('/proc/self/environ').read_text(), str(ring))))\n"
    )
    program = f"import os; from alphapulse_encryption import secrecy; secrecy.run_program(lambda: os.system({shell!r}))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**environment, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    given = (tmp_path / "given").read_bytes()
    assert b"PATH=" in given
    assert {find.secret for find in SCANNER.data(given, "sh")}.isdisjoint(kept)
    found, of_child, envelope = ast.literal_eval((tmp_path / "below").read_text())
    assert found == [SECRETS[name] for name in kept]
    assert {find.secret for find in SCANNER.text(of_child, "child")}.isdisjoint(kept)
    assert json.loads(envelope)["key_version"] == 2


@of_children
def test_keys_that_are_gone_with_their_process() -> None:
    told = python(
        "import os; os.environ['ALPHAPULSE_ENCRYPTION_KEYS_KEPT_AT'] = '/proc/1/fd/999'\n"
        "from alphapulse_encryption import get_cipher; get_cipher()"
    )
    assert "ConfigurationError: The process that kept the master key has ended." in told.stderr


@of_children
def test_keys_that_are_forgotten_are_nowhere() -> None:
    told = python(
        "import os; from pathlib import Path; from alphapulse_encryption import secrecy\n"
        "kept = lambda: sum('memfd:keys' in os.path.realpath(f) for f in Path('/proc/self/fd').iterdir())\n"
        "os.environ['VAULT_TOKEN'] = 'x'\n"
        "secrecy.keep_keys(); print(kept(), secrecy.with_keys()['VAULT_TOKEN'])\n"
        "secrecy.forget_keys(); print(kept(), secrecy.with_keys().get('VAULT_TOKEN'))\n"
        "secrecy.forget_keys()"
    )
    assert (told.stdout.splitlines(), told.stderr) == (["1 x", "0 None"], "")


CANARY = "canary-91c5d2aa"


def python(program: str) -> subprocess.CompletedProcess[str]:
    environment = {name: text for name, text in os.environ.items() if not name.startswith("ALPHAPULSE_")}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )


IN_EVERY_WAY = f"""
import threading
from alphapulse_encryption import secrecy
secrecy.tell_no_texts()

def work():
    try:
        int("{CANARY}")
    except ValueError as error:
        error.add_note("{CANARY}")
        raise KeyError("{CANARY}") from error

class Finalized:
    def __del__(self):
        work()

thread = threading.Thread(target=work)
thread.start()
thread.join()
Finalized()
work()
"""


def test_in_a_thread_in_a_finalizer_and_at_the_end() -> None:
    shown = python(IN_EVERY_WAY)
    assert shown.returncode == 1
    assert CANARY not in shown.stderr + shown.stdout
    assert shown.stderr.count("Unexpected KeyError. Its text is not kept") == 3
    assert shown.stderr.count("<string>:11 in work") == 3
    open_hearted = python(IN_EVERY_WAY.replace("secrecy.tell_no_texts()", ""))
    assert open_hearted.stderr.count(CANARY) >= 6


@pytest.mark.parametrize(
    "module",
    [
        "alphapulse_encryption",
        "alphapulse_encryption.ui",
        "alphapulse_encryption.cli.demo",
        "alphapulse_encryption.sample.postgres",
        "alphapulse_encryption.sample.database",
    ],
)
def test_a_program(module: str) -> None:
    """One that meets an error of nobody's at its very beginning."""
    shown = python(
        f"""
import argparse, resource, runpy, sys

def bad(*_, **__):
    print("core files:", resource.getrlimit(resource.RLIMIT_CORE)[0])
    raise KeyError("{CANARY}")

argparse.ArgumentParser.parse_args = bad
sys.argv = ["program"]
runpy.run_module("{module}", run_name="__main__", alter_sys=True)
"""
    )
    assert shown.returncode == 1, shown
    assert "core files: 0" in shown.stdout
    assert "Unexpected KeyError" in shown.stderr, shown
    assert CANARY not in shown.stderr


def test_no_program_is_without() -> None:
    main = 'if __name__ == "__main__":\n'
    package = Path(alphapulse_encryption.__file__).parent
    programs = {
        path.relative_to(package).as_posix(): path.read_text().partition(main)[2]
        for path in package.rglob("*.py")
        if main in path.read_text()
    }
    assert len(programs) >= 8
    del programs["sample/application/__main__.py"]  # the application's own, to be copied
    begins = "    secrecy.run_program(main)\n"
    both = ("tell_no_texts()\n", "leave_no_core()\n")
    assert all(one in inspect.getsource(secrecy.run_program) for one in (*both, "keep_keys()\n"))
    # A process that works for a rehearsal does both in what runs it.
    child = (package / "rehearsal" / "child.py").read_text()
    assert all(one in child.partition("def run(")[2].partition("\ndef ")[0] for one in both)
    runs = {
        name
        for name, text in programs.items()
        if name.startswith("rehearsal/") and text.startswith("    run(")
    }
    assert [name for name, text in programs.items() if not text.startswith(begins) and name not in runs] == []
