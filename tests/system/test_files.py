"""Files that others wrote: which one was meant."""

import shlex
import subprocess
import unicodedata

import pytest

from qlora.system.files import did_you_mean


@pytest.mark.parametrize("asked", ["rows.JSONL", "Rows.jsonl", "row.jsonl"])
def test_the_file_that_was_meant_is_named(tmp_path, asked):
    (tmp_path / "rows.jsonl").touch()
    assert did_you_mean(tmp_path / asked) == f"; did you mean {tmp_path / 'rows.jsonl'}?"
    assert did_you_mean(tmp_path / "other.yaml") == ""


@pytest.mark.parametrize(("there", "asked"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_of_two_names_that_look_the_same_one_becomes_the_other(tmp_path, there, asked):
    name = "gr\u00f6\u00dfe 2.jsonl"
    (tmp_path / unicodedata.normalize(there, name)).touch()
    missing = tmp_path / unicodedata.normalize(asked, name)
    if missing.exists():
        pytest.skip("this file system takes both for one name")
    said = did_you_mean(missing)
    assert "only looks the same" in said
    subprocess.run(shlex.split(said.partition(": ")[2]), check=True)
    assert missing.exists()
