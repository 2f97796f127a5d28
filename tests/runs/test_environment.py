"""What a run says of the code that made it."""

import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

import qlora
from qlora.runs import environment

ASKED = "import qlora.runs.environment as e; print(e.__file__, e._git_commit())"


def git(folder, *words):
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    return subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def committed(folder):
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "--allow-empty", "-m", "x")
    return git(folder, "rev-parse", "HEAD")


def package_in(folder):
    """Copy the package there, as far as the question needs it; return what it says of its commit."""
    there = folder / "qlora"
    (there / "runs").mkdir(parents=True)
    for file in ("__init__.py", "runs/__init__.py", "runs/environment.py"):
        shutil.copy(Path(qlora.__file__).parent / file, there / file)

    def asked():
        done = subprocess.run([sys.executable, "-c", ASKED], cwd=folder, check=True, capture_output=True, text=True)
        file, commit = done.stdout.split()
        assert Path(file) == there / "runs" / "environment.py"
        return commit

    return asked


def test_the_commit_of_a_checkout_is_recorded(tmp_path):
    asked = package_in(tmp_path)
    assert committed(tmp_path) == asked()


def test_an_installation_within_another_project_has_no_commit(tmp_path):
    (tmp_path / ".gitignore").write_text(".venv\n")
    committed(tmp_path)
    assert package_in(tmp_path / ".venv" / "site-packages")() == "None"


def test_the_version_is_that_of_the_code(monkeypatch):
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.0.1"
    )  # of an editable installation, by then older
    environment.version_of.cache_clear()
    try:
        assert environment.version_of(environment.OURS) == qlora.__version__
        assert environment.version_of("torch") == "0.0.1"
    finally:
        environment.version_of.cache_clear()
