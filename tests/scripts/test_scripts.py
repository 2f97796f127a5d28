"""Each script runs, at a tiny size: one that nobody runs rots."""

import json

import pytest

from tests import forked
from tests.conftest import CONVERSATIONS, messages, write_jsonl
from tests.test_layout import ROOT

SCRIPTS = ROOT / "scripts"
QUICK = {
    "measure_master_weights.py": "--model MODEL --data ROWS --steps 3 --rates 1e-3",
    "benchmark_kernels.py": "--model MODEL --tokens 32 --rounds 1 --json OUT",
    "longest_rows.py": "--layers 2",
    "benchmark_latency.py": "--model MODEL --methods dora,bottleneck,prompt_tuning --rank 4 --prompt 8 --tokens 3 --rounds 1",
    "readers_check.py": "MODEL --save OUT",
    "random_model.py": "--shape tiny --tokenizer MODEL --out OUT",
    "preference_data.py": "OUT --train-rows 4 --test-rows 2",
    "preference_pairs.py": "ANSWERS OUT",
    "quickstart_data.py": "OUT --train-rows 4 --test-rows 2",
    "quickstart_answer.py": "MODEL",
    "serve_check.py": "MODEL --server vllm --dry-run",
}
SLOW = {
    "benchmark_counts.py": "--model MODEL --data ROWS --micro-batches 2",
    "benchmark_load.py": "--gib 0.02 --shards 2 --rounds 1",
    "benchmark_start.py": "--model MODEL --rounds 1",
    "benchmark_threads.py": "--busy 0 --steps 1 --rounds 1 --layers 1 --tokens 32 --threads 1",
    "benchmark_data.py": "--model MODEL --data ALPACA --rows 8 --repeats 1 --max-length 256",
    "benchmark_train.py": "--model MODEL --full-rows 32 --steps 4 --rounds 1 --batch 2 --json OUT",
    "benchmark_micro_batches.py": "--model MODEL --data ROWS --rows 4 --steps 4 --rounds 1 --tokens 128",
    "measure_plan.py": "--tokenizer MODEL --smollm2 MODEL --only smollm2 --loads 128",
    "scaling.py": "",
    "benchmark_export.py": "--shape tiny --tokenizer MODEL --folder OUT --rounds 1",
}
ANSWERS = [
    {"prompt": messages([("user", "2 + 2")]), "expected": "4", "after": {"answer": said}} for said in ("4", "5", " ")
]
# downloads, and quickstart.sh runs it; those of test_gpu_check.py; no script of its own, tests/test_pretended.py uses it
ELSEWHERE = {"quickstart_model.py", "gpu_check.py", "gpu_run.py", "gpu_setup.py", "gpu_table.py", "pretended_cuda.py"}


@pytest.fixture
def run(tiny_model, tmp_path):
    """Return run(script, arguments) -> what it printed."""
    places = {
        "MODEL": tiny_model("llama"),
        "ROWS": write_jsonl(tmp_path / "rows.jsonl", [{"messages": messages(turns)} for turns in CONVERSATIONS]),
        "ALPACA": tmp_path / "alpaca.json",
        "ANSWERS": write_jsonl(tmp_path / "answers.jsonl", ANSWERS),
        "OUT": tmp_path / "out",
    }
    alpaca = [{"instruction": turns[0][1], "input": "", "output": turns[1][1]} for turns in CONVERSATIONS]
    places["ALPACA"].write_text(json.dumps(alpaca))

    def run(script, arguments):
        words = [str(places.get(word, word)) for word in arguments.split()]
        done = forked.run(SCRIPTS / script, *words)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


@pytest.mark.parametrize("script", QUICK)
def test_a_script_runs(run, script):
    assert run(script, QUICK[script])


def test_wrong_answers_make_pairs(run, tmp_path):
    assert run("preference_pairs.py", QUICK["preference_pairs.py"]).startswith("wrote 1 pairs of 3 answers")
    (pair,) = map(json.loads, (tmp_path / "out").read_text().splitlines())
    assert pair == {"prompt": messages([("user", "2 + 2")]), "chosen": "4", "rejected": "5"}


@pytest.mark.slow
@pytest.mark.parametrize("script", SLOW)
def test_a_slow_script_runs(run, script):
    assert run(script, SLOW[script])


def test_no_script_is_forgotten():
    assert {path.name for path in SCRIPTS.glob("*.py")} == QUICK.keys() | SLOW.keys() | ELSEWHERE
