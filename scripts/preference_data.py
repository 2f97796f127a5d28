"""Generate preference pairs for the quickstart's task: the right JSON object over one that is subtly wrong.

    python scripts/preference_data.py FOLDER          # writes FOLDER/pairs.jsonl and FOLDER/test_pairs.jsonl

The messages are made as those of scripts/quickstart_data.py, by other draws. The rejected answer has one field wrong: the day or
the month of the date, the hour, the first name alone, the last word of the subject alone. A model's own mistakes teach it more:
scripts/preference_pairs.py.
"""

import json
import random

from quickstart_data import main, make_row


def spoiled(answer, rng):
    """Return the JSON object `answer` with one field wrong."""
    found = dict(answer)
    year, month, day = map(int, answer["date"].split("-"))
    hour, minute = map(int, answer["time"].split(":"))
    ways = [
        {"date": f"{year}-{month:02}-{day % 28 + 1:02}"},
        {"date": f"{year}-{month % 12 + 1:02}-{min(day, 28):02}"},
        {"time": f"{(hour + 12) % 24:02}:{minute:02}"},
        {"time": f"{(hour + 1) % 24:02}:{minute:02}"},
        {"who": answer["who"].split()[0]},
        {"what": answer["what"].split()[-1]},
    ]
    return found | rng.choice([way for way in ways if {**found, **way} != found])


def write(path, num_rows, split, seed):
    """Write pairs for rows of the quickstart's task. split: 0 its words for training, 1 those for the test."""
    rng, seen = random.Random(f"preferences/{seed}/{split}"), set()
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        while len(seen) < num_rows:
            *prompt, answer = make_row(rng, split)["messages"]
            wrong = spoiled(json.loads(answer["content"]), rng)
            if prompt[-1]["content"] not in seen:
                seen.add(prompt[-1]["content"])
                row = {"prompt": prompt, "chosen": answer["content"], "rejected": json.dumps(wrong)}
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(__doc__, write, 240, ("pairs.jsonl", "test_pairs.jsonl"), "pairs")
