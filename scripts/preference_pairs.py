"""Make preference pairs of a model's own mistakes: the expected answer over the wrong one that it gave.

    qlora eval RUN --data ROWS --answers ANSWERS.jsonl
    python scripts/preference_pairs.py ANSWERS.jsonl PAIRS.jsonl

ROWS: rows with the right answers, others than those of the test. Answers that are right make no pair.
"""

import argparse
import json
from pathlib import Path


def pairs_of(rows):
    """Yield a pair of each of the rows of `qlora eval --answers` whose answer is wrong."""
    for row in rows:
        chosen, rejected = row["expected"], row["after"]["answer"]
        if rejected.strip() and rejected.strip() != chosen.strip():
            yield {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("answers", type=Path)
    parser.add_argument("pairs", type=Path)
    args = parser.parse_args()
    with args.answers.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    found = list(pairs_of(rows))
    text = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in found)
    args.pairs.write_text(text, encoding="utf-8", newline="\n")
    print(f"wrote {len(found)} pairs of {len(rows)} answers to {args.pairs}")
