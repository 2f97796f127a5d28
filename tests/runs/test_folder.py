"""A folder is whole or absent, and nothing of the user's is overwritten."""

import json
import os

import pytest

from qlora.jobs.comparing import compared_runs
from qlora.jobs.evaluating import win_rate
from qlora.jobs.talking import votes
from qlora.runs import record
from qlora.runs.folder import RunDir
from qlora.system.errors import DoesNotFit, InputError, Interrupted, TrainingFailed
from qlora.system.storage import add_line, new_folder, refuse_nonempty, write_json


def test_a_new_folder_appears_only_when_the_block_ends_well(tmp_path):
    out = tmp_path / "out"
    with new_folder(out) as folder:
        (folder / "file").write_text("x")
        assert not out.exists()
    assert (out / "file").read_text() == "x"
    assert list(tmp_path.iterdir()) == [out]


def test_a_failed_block_leaves_nothing(tmp_path):
    def fail():
        with new_folder(tmp_path / "out") as folder:
            (folder / "file").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_leftover_of_a_killed_process_is_replaced(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "stale").write_text("x")
    with new_folder(tmp_path / "out") as folder:
        assert list(folder.iterdir()) == []


def test_folder_follows_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        with new_folder(tmp_path / "out"):
            pass
    finally:
        os.umask(old)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


def test_files_of_the_user_are_never_overwritten(tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(InputError, match="not empty"):
        refuse_nonempty(tmp_path, "export")
    with pytest.raises(InputError, match="is a file"):
        refuse_nonempty(tmp_path / "mine", "export")


def test_a_number_that_is_not_finite_is_never_written_as_json(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_did_not_finish_is_named_as_such(tmp_path, make_recipe):
    recipe = make_recipe(output_dir=str(tmp_path / "run"))
    with RunDir.create(recipe):
        pass
    with pytest.raises(InputError, match="contains an unfinished run"), RunDir.create(recipe):
        pass
    with pytest.raises(InputError, match="did not finish"):
        RunDir.open(tmp_path / "run")


def test_an_output_dir_that_cannot_be_made_is_an_input_error(tmp_path, make_recipe):
    (tmp_path / "file").write_text("x")
    for folder, expected in (("file/run", "choose another folder"), ("file", "is a file")):
        with pytest.raises(InputError, match=expected), RunDir.create(make_recipe(output_dir=str(tmp_path / folder))):
            pass


def fail(recipe, error, name):
    """Begin a run that writes the file `name` of its folder, and ends with `error`."""
    with RunDir.create(recipe) as run:
        getattr(run, name).write_text("{}")
        raise error


@pytest.mark.parametrize("error", [InputError("wrong"), Interrupted(15)])
def test_a_run_that_has_not_begun_to_train_leaves_nothing(tmp_path, make_recipe, error):
    recipe, folder = make_recipe(output_dir=str(tmp_path / "run")), tmp_path / "run"
    with pytest.raises(type(error)):
        fail(recipe, error, "environment_file")
    assert not folder.exists()
    folder.mkdir()  # of the user
    with pytest.raises(type(error)):
        fail(recipe, error, "environment_file")
    assert list(folder.iterdir()) == []
    with pytest.raises(type(error)):
        fail(recipe, error, "metrics_file")
    assert RunDir(folder).recipe_file.exists()


def test_a_signal_while_the_recipe_is_written_leaves_nothing(tmp_path, make_recipe, monkeypatch):
    def interrupted(_):
        raise Interrupted(2)

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(Interrupted), RunDir.create(make_recipe()):
        pass
    assert not (tmp_path / "run").exists()


def test_what_was_measured_before_memory_ran_out_is_kept(tmp_path, make_recipe):
    with pytest.raises(DoesNotFit):
        fail(make_recipe(output_dir=str(tmp_path / "run")), DoesNotFit(""), "memory_file")
    assert RunDir(tmp_path / "run").memory_file.exists()


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (Interrupted(2, "stopped; go on with: x"), "stopped", "stopped; go on with: x"),
        (DoesNotFit("12 GiB are needed"), "does not fit", "12 GiB are needed"),
        (TrainingFailed("the loss has diverged"), "failed", "the loss has diverged"),
        (KeyError(), "failed", "KeyError"),
    ],
)
def test_what_ends_a_training_is_kept_once_it_has_begun(tmp_path, error, status, message):
    run = RunDir(tmp_path)
    for begun in (False, True):
        if begun:
            run.metrics_file.touch()
        with pytest.raises(type(error)), run.says_how_it_ends():
            raise error
        assert (run.ended() is not None) == begun
    assert run.ended() == {"status": status, "message": message}
    run.ended_file.unlink()
    (tmp_path / "adapter").mkdir()  # a finished run that could not go on is left as it was
    with pytest.raises(type(error)), run.says_how_it_ends():
        raise error
    assert run.ended() is None


def test_whether_a_run_is_in_use_is_known_without_touching_it(tmp_path):
    run = RunDir(tmp_path)
    assert not run.in_use()
    assert not run.lock_file.exists()
    with run.locked():
        held = run.lock_file.read_text()
        assert run.in_use()
        assert run.lock_file.read_text() == held
    assert not run.in_use()


def test_half_a_character_is_kept_as_an_escape(tmp_path):
    """It has no bytes in UTF-8, and may be in what somebody typed into a browser."""
    value = {"asked": "half \ud83d", "ä": "ß"}
    write_json(tmp_path / "a.json", value)
    add_line(tmp_path / "b.jsonl", value)
    add_line(tmp_path / "b.jsonl", {"ä": "ß"})
    assert json.loads((tmp_path / "a.json").read_bytes()) == value
    assert [json.loads(line) for line in (tmp_path / "b.jsonl").read_bytes().splitlines()] == [value, {"ä": "ß"}]
    assert "ß".encode() in (tmp_path / "b.jsonl").read_bytes()


def test_files_that_are_nested_without_end_are_damaged_and_no_crash(tmp_path):
    """A run folder may come from somebody else. Python's JSON has an error of its own for that, which is no ValueError."""
    run, deep = RunDir(tmp_path), "[" * 100_000
    for file in (run.data_report_file, run.environment_file, run.metrics_file, run.answers_file, run.votes_file):
        file.write_text(f"{deep}\n")
    run.eval_file.write_text('{"metrics": {}}')
    for read in (run.data_report, run.environment, lambda: record.read(run), lambda: compared_runs.measured(run)):
        with pytest.raises(InputError, match="the run folder is damaged"):
            read()
    with pytest.raises(InputError, match="line 1: not a vote"):
        votes.read(run.votes_file)
    assert win_rate.known_replies(run.answers_file) == {}


def test_a_folder_that_cannot_be_written_to_is_refused_and_another_is_left_as_it_is(tmp_path):
    RunDir(tmp_path).refuse_unwritable()
    assert list(tmp_path.iterdir()) == []
    if not os.path.isdir("/proc/self"):  # noqa: PTH112
        pytest.skip("no folder here that root cannot write to either")
    with pytest.raises(InputError, match=r"/proc/self: .*; .* copy the run folder"):
        RunDir("/proc/self").refuse_unwritable()
