"""Options of verbs that have many; those that several verbs share, or that are one verb's alone, are in cli.py."""

from __future__ import annotations

from typing import Annotated

import typer

# of `qlora eval`
Metric = Annotated[
    list[str] | None,
    typer.Option(help="a further metric of the answers: macro_f1, rougeL, bleu, chrf; may be repeated"),
]
BeforeOf = Annotated[
    str | None, typer.Option(metavar="RUN", help="take the base's answers of this run, on the same base and rows")
]
JudgeUrl = Annotated[
    str | None,
    typer.Option(
        "--judge", metavar="URL", help="ask a model which answers are better: an OpenAI-compatible endpoint, .../v1"
    ),
]
JudgeModel = Annotated[str | None, typer.Option(metavar="NAME", help="with --judge: the model's name there")]
JudgeAgainst = Annotated[
    str | None,
    typer.Option(
        metavar="before|expected|RUN", help="with --judge: better than which; default: before, the base's answers"
    ),
]
JudgeCriteria = Annotated[
    str | None, typer.Option(metavar="TEXT", help="with --judge: what makes an answer better, in words")
]
# instead of answers to held-out rows
Choices = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="instead: which choices of these questions are likeliest (question, choices, answer)"
    ),
]
ByText = Annotated[
    bool, typer.Option("--by-text", help="with --choices: score the text of each choice, not its letter")
]
LmEval = Annotated[str | None, typer.Option(metavar="TASK[,TASK]", help="instead: tasks of lm-eval, by its own code")]
IncludePath = Annotated[str | None, typer.Option(metavar="FOLDER", help="with --lm-eval: a folder of further tasks")]
Shots = Annotated[int | None, typer.Option(min=0, help="with --choices or --lm-eval: examples before each question")]
Examples = Annotated[
    str | None, typer.Option(metavar="FILE", help="with --choices: those examples; default: the run's training rows")
]
AskedInChat = Annotated[bool, typer.Option("--chat", help="with --choices or --lm-eval: ask under the chat template")]

# of `qlora chat`
Prompt = Annotated[
    str | None, typer.Option(help="answer this prompt and exit; without it, chat in the terminal; /help shows how")
]
System = Annotated[str | None, typer.Option(help="a system message")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="longest answer, in tokens")]
Temperature = Annotated[
    float | None, typer.Option(help="draw tokens by chance, the more evenly the higher; default: the likeliest")
]
TopP = Annotated[float | None, typer.Option(help="draw among the likeliest tokens that have this share together")]
TopK = Annotated[int | None, typer.Option(help="draw among this many tokens")]
Seed = Annotated[int | None, typer.Option(help="of what is drawn: the same one, the same answer")]
Adapter = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=RUN", help="load the adapter of another run on the same base too; may be repeated"),
]
Use = Annotated[
    str | None, typer.Option(metavar="NAME", help="the adapter that answers; base: none. Default: that of RUN")
]
Web = Annotated[
    bool,
    typer.Option("--web", help="base and tuned side by side in the browser, and blind votes; on this machine only"),
]
Port = Annotated[int | None, typer.Option(min=0, max=65535, help="with --web: default 7860, or the next that is free")]
Host = Annotated[str | None, typer.Option(help="with --web: 127.0.0.1 by default; 0.0.0.0 lets others in")]
Votes = Annotated[
    str | None, typer.Option(metavar="FILE.jsonl", help="with --web: where votes go; default: votes.jsonl in the run")
]
