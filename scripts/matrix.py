"""Run the suite on every supported Python and Django that is here: `make matrix`, or `make matrix ARGS="py3.12 dj6.1"`.

Each pair gets a virtual environment of its own in .matrix/, kept until pyproject.toml changes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".matrix"
PYTHONS = ["3.11", "3.12", "3.13"]
DJANGOS = {"5.2": "3.11", "6.0": "3.12", "6.1": "3.12"}  # and the oldest Python (of ours) that each one takes
DATABASES = ["sqlite", "postgres"]


def find_python(version: str) -> str | None:
    """The interpreter of that version, from the PATH or from pyenv."""
    found = [shutil.which(f"python{version}")]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found += map(str, pyenv.glob(f"versions/{version}.*/bin/python{version}"))
    # Asked, not believed: pyenv's shims are on the PATH for versions that are not switched on.
    code = f"import sys; sys.exit('%d.%d' % sys.version_info[:2] != {version!r})"
    return next((p for p in found if p and subprocess.run([p, "-c", code], capture_output=True).returncode == 0), None)


def prepare(interpreter: str, django: str, home: Path) -> Path:
    """Return the Python of an environment with the package, the test group and that Django."""
    python, stamp = home / "bin" / "python", home / ".stamp"
    project = ROOT / "pyproject.toml"
    if stamp.exists() and stamp.stat().st_mtime > project.stat().st_mtime:
        return python
    groups = ["--editable", str(ROOT), "--group", f"{project}:test"]
    pip = [str(python), "-m", "pip", "install", "-qq"]
    subprocess.run([interpreter, "-m", "venv", "--clear", str(home)], check=True)
    subprocess.run([*pip, "pip>=25.1"], check=True)
    subprocess.run([*pip, *groups, f"Django~={django}.0"], check=True)
    stamp.touch()
    return python


def run_suite(python: Path, database: str, log: Path) -> str:
    """Run one half of the suite; the result is a word for the table."""
    environment = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
    started = time.monotonic()
    with log.open("w") as output:
        command = [str(python), "-m", "pytest", f"--db={database}", "-q", "-p", "no:cacheprovider"]
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT).returncode
    if code:
        print(log.read_text()[-3000:], f"(all of it: {log.relative_to(ROOT)})", sep="\n", flush=True)
    return f"{'FAILED' if code else 'passed'} in {time.monotonic() - started:.0f} s"


def run_pair(version: str, django: str, interpreter: str) -> list[str]:
    """One row of results: a word for each database."""
    home = WORK / f"py{version}-dj{django}"
    print(f"Python {version}, Django {django} ...", flush=True)
    try:
        python = prepare(interpreter, django, home)
    except subprocess.CalledProcessError as error:
        print(error, flush=True)
        return ["FAILED to install"] * len(DATABASES)
    return [run_suite(python, database, home.with_name(f"{home.name}-{database}.log")) for database in DATABASES]


def main(wanted: list[str]) -> int:
    WORK.mkdir(exist_ok=True)
    interpreters = {version: find_python(version) for version in PYTHONS}
    rows = []
    for version, interpreter in interpreters.items():
        for django, oldest in DJANGOS.items():
            name = f"py{version}-dj{django}"
            if PYTHONS.index(version) < PYTHONS.index(oldest) or not all(word in name.split("-") for word in wanted):
                continue
            results = run_pair(version, django, interpreter) if interpreter else ["skipped"] * len(DATABASES)
            rows.append([version, django, *results])

    print()
    for row in [["Python", "Django", "SQLite", "PostgreSQL"], *rows]:
        print("{:8}{:8}{:22}{}".format(*row))
    for version, interpreter in interpreters.items():
        if interpreter is None:
            print(f"Skipped: no Python {version} is here.")
    failed = any("FAILED" in word for row in rows for word in row)
    nothing = all("skipped" in word for row in rows for word in row[2:])
    return 1 if failed or nothing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
