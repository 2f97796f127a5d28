"""A judge says which answers of an evaluation are better: than the base's, than what was expected, than those of another run."""

from __future__ import annotations

import contextlib
import json

from ...evaluation import judge
from ...evaluation.asked import BEFORE, EXPECTED
from ...runs.folder import RunDir
from ...system.errors import InputError
from ...system.events import note
from ...system.files import lines_of
from ..comparing import compared_runs

_BY_ORDER, _BY_LENGTH = 1 / 3, 3 / 4  # shares from which on it is said that a judge goes by place, or by length
_FEW = 10
_WRITTEN_EVERY = 25  # rows
_DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


def opponents(against, recipe, name, asked) -> tuple[str, list[str] | None]:
    """Return whose answers are to be beaten, in words for a file, and those of another run; None: they come with this evaluation.

    against: as Asked.judge_against. recipe: of the run that is evaluated, None of a model. name: of the score, see
    RunDir.score_files. asked: what each row asks, as JSON.

    Raises:
        InputError: the other run was not evaluated on these rows.
    """
    if against is None and recipe is not None and (start := recipe.model.adapter_name_or_path):
        note(
            f"the judge compares with the base, not with {start} that the training began with: --judge-against {start} does"
        )
    against = against or (EXPECTED if recipe is None else BEFORE)
    if against in (BEFORE, EXPECTED):
        return against, None
    if not RunDir.is_run(against):
        raise InputError(f"--judge-against {against}: is not a run; name one, or {BEFORE} or {EXPECTED}")
    other = compared_runs.measured(RunDir.open(against), name)
    if [one for one, _ in other.rows] != list(asked):
        raise InputError(f"--judge-against {against}: was evaluated on other rows; evaluate it on these first")
    return str(against), other.answers


def known_replies(file) -> dict[str, str]:
    """Return {Judge.key: reply} of the verdicts in an answers.jsonl of an earlier evaluation; {} where there are none."""
    found = {}
    with contextlib.suppress(*_DAMAGED):  # it is written anew
        for line in lines_of(file):
            replies = json.loads(line).get("judge", {}).get("replies", ())
            found |= {one["key"]: one["text"] for one in replies if judge.verdict_in(one["text"])}
    return found


def keep(result, rows, score_file, answers_file) -> None:
    """Keep what a judge has said of these answers in an earlier evaluation, as the files have it: it was paid for.

    result, rows: of an evaluation without a judge. Rows with other answers than then have no verdict; where there are such, or
    more or fewer rows, the result has no win rate.
    """
    with contextlib.suppress(*_DAMAGED):  # then it is written anew
        then = list(map(json.loads, lines_of(answers_file)))
        known = {_answered(row): row["judge"] for row in then if "judge" in row}
        for row in rows:
            if (said := known.get(_answered(row))) is not None:
                row["judge"] = said
        if len(then) == len(rows) and all("judge" in row for row in rows):
            result["judge"] = json.loads(score_file.read_text(encoding="utf-8"))["judge"]


def _answered(row):
    return json.dumps([row["prompt"], row["expected"], row.get("before", {}).get("answer"), row["after"]["answer"]])


def add(result, rows, endpoint, against, others, known, write) -> None:
    """Ask a judge about every row, and add what it says: "judge" to each of `rows` as it comes, and at last to the result.

    result, rows: of an evaluation. endpoint: as judge.opened returns it. against, others: as `opponents` returns them. known: as
    known_replies returns it. write(): is called now and then, because replies cost money.

    Raises:
        InputError: the judge has gone, or refuses; says how many rows it has judged.
    """
    if others is None:
        others = [row[EXPECTED] if against == EXPECTED else row[BEFORE]["answer"] for row in rows]
    answers, judged = [row["after"]["answer"] for row in rows], {}

    def keep(number, one):
        judged[number] = one
        rows[number]["judge"] = one.to_json() | {"against": others[number]}
        if len(judged) % _WRITTEN_EVERY == 0 and len(judged) >= len(known) / 2:  # two replies a row; those come first
            write()

    who = endpoint.judge
    note(f"asks {who.model} about {len(rows):,} rows: their prompts and both answers are sent to {who.host}")
    try:
        judge.compare(endpoint, [_in_words(row["prompt"]) for row in rows], answers, others, dict(known), keep)
    except InputError as error:
        raise InputError(
            f"{error}\n  {len(judged):,} of {len(rows):,} rows are judged, and kept with their answers; the same command goes on"
        ) from None
    of = {"model": who.model, "host": who.host, "criteria": who.criteria}
    result["judge"] = (
        of | {"against": against} | judge.win_rate([judged[number] for number in range(len(rows))], answers, others)
    )
    whys = [[one["refused"] for one in each.replies if "refused" in one] for each in judged.values()]
    if refused := [why[0] for why in whys if why]:
        note(f"{len(refused):,} of {len(rows):,} rows are refused: {refused[0]}")
    _say_biases(result["judge"])


def _say_biases(found):
    decided = found["wins"] + found["losses"]
    rows = decided + found["ties"]
    if found["no_verdict"]:
        note(f"the judge gave no verdict on {found['no_verdict']:,} rows: they are not in the win rate")
    if rows and found["by_order"] > _BY_ORDER * rows:
        note(
            f"the judge went by the place in {found['by_order']:,} of {rows:,} rows: it preferred what stood there in both "
            "orders. These are ties; a stronger judge has fewer"
        )
    if decided >= _FEW and found["longer"] is not None and found["longer"] >= _BY_LENGTH:
        note(f"the longer answer won {found['longer']:.0%} of the decided rows: the judge may prefer length")


def _in_words(messages) -> str:
    """Return what a row asks as a text: a single message of a user as it is, several under the names of who says them."""
    if [one["role"] for one in messages] == ["user"]:
        return messages[0]["content"]
    return "\n\n".join(f"[{one['role']}]\n{_said(one)}" for one in messages)


def _said(message):
    calls = json.dumps(message["tool_calls"], ensure_ascii=False) if message.get("tool_calls") else ""
    return "\n".join(filter(None, (message["content"], calls)))
