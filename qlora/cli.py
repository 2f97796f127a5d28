"""argv -> verb. Heavy imports happen inside the verbs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options, process
from .completion import action_argument, card_option, name_argument
from .system import launched
from .system.errors import DoesNotFit, InputError
from .system.quiet_libraries import hush_libraries

app = typer.Typer(
    name="qlora",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="4-bit LoRA fine-tuning on one consumer GPU, with proof.",
)

RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="a YAML file; see recipes/")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="change the recipe: section.field=value")
]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON to stdout")]
Target = Annotated[
    str, typer.Argument(metavar="RUN|MODEL", help="a run folder, RUN/checkpoints/step-N, a model folder or a hub name")
]


def _load(recipe, overrides):
    """Return the Recipe of a verb that takes one; what is wrong with it is said before anything heavy is imported."""
    from .recipe import Recipe

    return Recipe.load(recipe, overrides or ())


def _run(verb, as_json, *args, steps=False, models=True, **kwargs):
    """Return what a public function of qlora returns; with --json that is printed instead of its lines and tables, also where
    the verb had found it all and then ended with an error. models: whether it needs their libraries, which takes seconds."""
    hush_libraries(models)
    import qlora

    from .system import events
    from .terminal import shown

    found: list[dict] = []
    try:
        with (
            shown(results=not as_json, steps=steps),
            events.heard_by(lambda event: found.append(event.value) if isinstance(event, events.Found) else None),
        ):
            result = getattr(qlora, verb)(*args, **kwargs)
    except Exception:
        if as_json and found:
            _print_json(found[-1])
        raise
    if as_json:
        _print_json(result)
    return result


def _print_json(value):
    utf8 = "utf" in (getattr(sys.stdout, "encoding", None) or "").lower()
    print(json.dumps(value, indent=2, ensure_ascii=not utf8))


@app.command(
    epilog="Example:  qlora init --model Qwen/Qwen2.5-7B-Instruct --data mine.jsonl --card 4090 --goal quality"
)
def init(
    overrides: Overrides = None,
    model: Annotated[str | None, typer.Option(help="a folder, or OWNER/NAME on the hub")] = None,
    data: Annotated[str | None, typer.Option(help="a file, glob or folder of rows, which are read")] = None,
    card: Annotated[
        str | None, card_option(help="such as 4090, 12GiB or cpu; default: the GPU of this machine")
    ] = None,
    goal: Annotated[str | None, typer.Option(help="quality, speed, long (rows) or small (adapter)")] = None,
    source: Annotated[
        str | None, typer.Option("--from", metavar="FILE", help="instead: read a YAML file of axolotl or LLaMA-Factory")
    ] = None,
    out: Annotated[str, typer.Option(help="the recipe to write; never overwritten")] = "recipe.yaml",
    as_json: Json = False,
):
    """Write a short recipe that fits, each line with its reason; asks for what is not given. Exit code 3 if nothing fits."""
    if source is not None:
        if any(given is not None for given in (model, data, card, goal)):
            raise InputError("--from reads all from its file; leave out --model, --data, --card and --goal")
        _run("migrate", as_json, source, out, overrides or ())
        return
    from .commands.ask import ask

    _run("init", as_json, *ask(model, data, card, goal), out, overrides or ())


@app.command(epilog="Example:  qlora recipes copy bert-base-uncased/sst2 --out mine.yaml")
def recipes(
    action: Annotated[str | None, action_argument(metavar="[show|copy]", help="print one, or copy it")] = None,
    name: Annotated[str | None, name_argument(metavar="[NAME]", help="as `qlora recipes` lists it")] = None,
    out: Annotated[str | None, typer.Option(help="with copy: where to; default: its own file name")] = None,
    card: Annotated[str | None, card_option(help="of the list: plan each for this card, such as 4090")] = None,
    as_json: Json = False,
):
    """List the recipes that ship with qlora, print one, or copy it to change it; nothing is overwritten."""
    if action not in (None, "show", "copy") or (action is None) != (name is None):
        raise InputError("type qlora recipes, qlora recipes show NAME, or qlora recipes copy NAME [--out FILE]")
    if (out and action != "copy") or (card and action):
        raise InputError("--out is for qlora recipes copy NAME, and --card for qlora recipes")
    verb = {None: "list_recipes", "show": "show_recipe", "copy": "copy_recipe"}[action]
    arguments = {None: [card], "show": [name], "copy": [name, out]}[action]
    _run(verb, as_json, *arguments, models=False)


@app.command(epilog="Example:  qlora doctor runs --json")
def doctor(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="where runs are to be written")] = "runs",
    as_json: Json = False,
):
    """Check this machine: versions, device, a real NF4 step, optimizer, disk; exit code 2 if something is wrong."""
    from .commands.doctor import doctor
    from .terminal import shown

    with shown(results=not as_json):
        found = doctor(folder)
    if as_json:
        _print_json(found)
    if not all(check["ok"] for check in found["checks"]):
        raise typer.Exit(InputError.exit_code)


@app.command(epilog="Example:  qlora train recipes/mine.yaml training.learning_rate=1e-4 output_dir=runs/slow")
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="resume the run in output_dir from its newest complete checkpoint")
    ] = False,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD", help="with --resume: accept that this field has changed since the run started"),
    ] = None,
    as_json: Json = False,
):
    """Train an adapter from a recipe; writes a run folder at its output_dir."""
    run = _run("train", False, _load(recipe, overrides), resume, allow_change or (), steps=True)
    if as_json and launched.is_first():
        from .runs import record

        _print_json({"run": str(run.path), "last": record.to_json(record.read(run)[-1])})


@app.command(epilog="Example:  qlora plan recipes/mine.yaml data.max_length=8192 --card 4090 --plot memory.png")
def plan(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="a YAML file; see recipes/")] = None,
    overrides: Overrides = None,
    vram: Annotated[str | None, typer.Option(help="available memory, such as 24GiB; default: the GPU's")] = None,
    card: Annotated[
        str | None, card_option(help="such as 3060, 4090, T4, or cpu for this machine's; `--card list` prints all")
    ] = None,
    plot: Annotated[str | None, typer.Option(help="draw memory by sequence length into this PNG or SVG")] = None,
    methods: Annotated[bool, typer.Option("--methods", help="what each method would cost, and which to take")] = False,
    processes: Annotated[int | None, typer.Option(help="plan a step on so many cards, beside one")] = None,
    link: Annotated[float | None, typer.Option(help="GB/s between two cards, for --processes")] = None,
    as_json: Json = False,
):
    """Say what training will cost and whether it fits, from config.json alone; exit code 3 if it does not."""
    if card == "list":
        if recipe is not None or overrides or methods or processes is not None or plot is not None or vram is not None:
            raise InputError("--card list prints the cards and plans nothing; leave all else out, or name one of them")
        _run("list_cards", as_json, models=False)
        return
    if recipe is None:
        raise InputError("qlora plan needs a recipe: qlora plan RECIPE; see recipes/")
    if sum((methods, processes is not None, plot is not None)) > 1:
        raise InputError("--methods, --plot and --processes are plans of their own; give one of them")
    if link is not None and processes is None:
        raise InputError("--link is the GB/s between several cards: give --processes too, such as --processes 2")
    if methods:
        every = _run("plan_methods", as_json, _load(recipe, overrides), vram, card)
        fits = any(one["fits"] for one in every["methods"])
    elif processes is not None:
        fits = _run("plan_processes", as_json, _load(recipe, overrides), processes, vram, card, link)["fits"]
    else:
        fits = _run("plan", as_json, _load(recipe, overrides), vram, card, plot)["fits"]
    if not fits:
        raise typer.Exit(DoesNotFit.exit_code)


@app.command("data", epilog="Example:  qlora data recipes/mine.yaml --row 17 --tokens")
def inspect_data(
    recipe: RecipeFile,
    overrides: Overrides = None,
    row: Annotated[int | None, typer.Option(min=1, help="render this training row; default: the first two")] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="show the id of each token")] = False,
    html: Annotated[str | None, typer.Option(help="also write the report and sample rows to this HTML file")] = None,
    as_json: Json = False,
):
    """Show what the model will see: rows, lengths, and which tokens are trained; reads no weights."""
    _run("inspect_data", as_json, _load(recipe, overrides), row, tokens, html)


@app.command("eval", epilog="Example:  qlora eval runs/mine --data test.jsonl --require 'exact_match>=0.8'")
def evaluate(
    target: Target,
    overrides: Overrides = None,
    data: Annotated[
        str | None, typer.Option(help="file of rows to evaluate on; default: the run's held-out rows")
    ] = None,
    max_rows: Annotated[
        int | None,
        typer.Option(min=1, help="use the first N rows; default: 100 where answers are generated, else all"),
    ] = None,
    metric: options.Metric = None,
    extract: Annotated[
        str | None, typer.Option(help="compare this part of answers: a regular expression, or Jinja with {{ answer }}")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="rows that are computed together; fewer take less memory; default: 25")
    ] = None,
    forgetting: Annotated[
        str | None,
        typer.Option(metavar="FILE|built-in", help="measure how much loss rose on text that was not trained on"),
    ] = None,
    latency: Annotated[bool, typer.Option("--latency", help="measure the time of an answer's token")] = False,
    before_of: options.BeforeOf = None,
    judge: options.JudgeUrl = None,
    judge_model: options.JudgeModel = None,
    judge_against: options.JudgeAgainst = None,
    judge_criteria: options.JudgeCriteria = None,
    choices: options.Choices = None,
    by_text: options.ByText = False,
    lm_eval: options.LmEval = None,
    include_path: options.IncludePath = None,
    shots: options.Shots = None,
    examples: options.Examples = None,
    chat: options.AskedInChat = False,
    answers: Annotated[
        str | None, typer.Option(metavar="FILE", help="write every answer to this file too, as JSON Lines")
    ] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME>=NUMBER", help="exit with code 4 unless it is so; may be repeated"),
    ] = None,
    max_forgetting: Annotated[
        float | None, typer.Option(help="exit with code 4 if that loss rose by more, in nats a token")
    ] = None,
    as_json: Json = False,
):
    """Measure loss, and right answers or classes, on held-out rows; for a run, before and after training."""
    tasks = [name.strip() for name in (lm_eval or "").split(",") if name.strip()]
    if lm_eval is not None and not tasks:
        raise InputError("--lm-eval: name a task, such as --lm-eval arc_easy")
    asked: dict[str, Any] = {"metrics": metric or (), "extract": extract, "batch_size": batch_size}
    asked |= {"forgetting": forgetting, "latency": latency, "require": require or (), "max_forgetting": max_forgetting}
    asked |= {"choices": choices, "by_text": by_text, "tasks": tasks, "include_path": include_path, "shots": shots}
    asked |= {"examples": examples, "chat": chat, "answers": answers, "before_of": before_of, "judge_url": judge}
    asked |= {"judge_model": judge_model, "judge_against": judge_against, "judge_criteria": judge_criteria}
    _run("evaluate", as_json, target, data, overrides or (), max_rows, **asked)


@app.command(epilog="Example:  qlora export runs/mine --out models/mine --dtype bfloat16")
def export(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|ADAPTER [KEY=VALUE]",
            help="a finished run, any PEFT adapter folder, or several RUN:WEIGHT to sum; then changes to the recipe",
        ),
    ],
    out: Annotated[str, typer.Option(help="output folder; must be new or empty")],
    model: Annotated[str | None, typer.Option(help="for an adapter: the model that it was trained on")] = None,
    dtype: Annotated[str | None, typer.Option(help="float16, bfloat16 or float32; default: the recipe's")] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="merge into: dequantized, the 4-bit weights used in training; or original, the 16-bit weights of the files"
        ),
    ] = None,
    compare_bases: Annotated[
        bool, typer.Option("--compare-bases", help="measure both bases, in 16 bit and quantized to 4 bit again")
    ] = False,
    verify: Annotated[
        str | None, typer.Option(help="full, layers (little memory), off; default: full where it fits")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="file of rows for the proof; default: the run's held-out rows")
    ] = None,
    gguf: Annotated[
        str | None,
        typer.Option(help="f16, q8_0, q4_k_m: add a GGUF file and a Modelfile; adapter: only LoRA, to --out FILE.gguf"),
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="write dynamic int8 for CPUs instead, by torchao")] = False,
    as_json: Json = False,
):
    """Write the merged full-precision model and prove that it is the trained one; if the proof fails, write nothing."""
    flags = {"dtype": dtype, "base": base, "verify": verify, "int8": "true" if int8 else None}
    paths = [target for target in targets if Path(target).exists() or Path(target.rpartition(":")[0] or "?").exists()]
    overrides = [target for target in targets if "=" in target and target not in paths]
    targets = [target for target in targets if target not in overrides]
    if not targets:
        raise InputError("give the run to export; `qlora adapters` lists what there is")
    chosen = [*overrides, *(f"export.{name}={value}" for name, value in flags.items() if value is not None)]
    asked = {"model": model, "data": data, "compare_bases": compare_bases, "gguf": gguf}
    _run("export", as_json, targets, out, None, chosen, **asked)


@app.command(epilog="Example:  qlora push models/mine me/my-model --dry-run")
def push(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="a finished run, or a folder that export wrote")],
    repo: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="repository on the hub; created if it does not exist")
    ],
    public: Annotated[bool, typer.Option("--public", help="make the repository public; default: private")] = False,
    base: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="hub name of the base model, if the run used a local folder"),
    ] = None,
    license: Annotated[
        str | None, typer.Option(metavar="ID", help="license id for the model card, such as apache-2.0; default: none")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show files and card, upload nothing")] = False,
    as_json: Json = False,
):
    """Upload a run's adapter or an exported model to the Hugging Face hub, with a model card; private by default."""
    _run("push", as_json, target, repo, public=public, base=base, license=license, dry_run=dry_run)


@app.command(epilog="Example:  qlora adapters runs --json")
def adapters(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="folder to search, with its subfolders")] = "runs",
    as_json: Json = False,
):
    """List runs, checkpoints and adapters with what they were trained on and how good they are."""
    _run("adapters", as_json, folder, models=False)


@app.command(epilog="Example:  qlora compare comparisons/methods.yaml --resume")
def compare(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="COMPARISON|RUN RUN",
            help="a YAML file of variants, then field=value to change it; or two finished runs; with --served one",
        ),
    ],
    resume: Annotated[bool, typer.Option("--resume", help="go on with the comparison in its output_dir")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only plan: which fit, and how long it will take")] = False,
    served: Annotated[
        bool, typer.Option("--served", help="one run in each form that it can be served in: size, speed, loss, KL")
    ] = False,
    form: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="with --served: this form only; may be repeated")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="with runs: file of rows that they were evaluated on; default: held-out rows")
    ] = None,
    max_rows: Annotated[int | None, typer.Option(min=1, help="with --served: the first N rows; default: 32")] = None,
    as_json: Json = False,
):
    """Train variants x settings x seeds of a recipe and put them into one table; show two runs side by side; or, with --served,
    measure one run in each form that it can be served in."""
    from .runs.folder import RunDir

    first, *others = targets
    if served:
        if others or resume or dry_run:
            raise InputError("--served takes one finished run: qlora compare RUN --served")
        _run("compare_served", as_json, first, data, max_rows, form or ())
        return
    if form or max_rows is not None or (data is not None and not RunDir.is_run(first)):
        raise InputError("--form and --max-rows go with --served, --data with runs: qlora compare RUN --served")
    if not RunDir.is_run(first):
        found = _run("compare", as_json, first, others, resume, dry_run)
        if not dry_run and all(row["status"] != "done" for row in found["rows"]):
            raise typer.Exit(1)
    elif len(others) != 1 or resume or dry_run:
        raise InputError("two runs are compared by themselves: qlora compare RUN RUN")
    else:
        _run("compare_runs", as_json, first, others[0], data)


@app.command(epilog="Example:  qlora report runs/mine --out mine.html")
def report(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|COMPARISON [MORE]...",
            help="runs, finished or not; or the folder or YAML file of a comparison; beside one run, folders of its exports",
        ),
    ],
    out: Annotated[
        str | None, typer.Option(metavar="PAGE.html", help="the page; PAGE.json beside it has the same numbers")
    ] = None,
    as_json: Json = False,
):
    """Write one page on a run or several: verdict, curves, memory, data, answers, proof; it needs no network."""
    if out is None and not as_json:
        raise InputError("give --out PAGE.html, or --json to print the numbers alone")
    _run("report", as_json, targets, out, models=False)


@app.command(epilog='Example:  qlora chat runs/mine --prompt "What can you do?"')
def chat(
    target: Target,
    overrides: Overrides = None,
    prompt: options.Prompt = None,
    system: options.System = None,
    max_new_tokens: options.MaxNewTokens = 512,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    seed: options.Seed = None,
    adapter: options.Adapter = None,
    use: options.Use = None,
    web: options.Web = False,
    port: options.Port = None,
    host: options.Host = None,
    votes: options.Votes = None,
    as_json: Json = False,
):
    """Chat with a run or a model, in the terminal or the browser; greedy unless a temperature is given."""
    from .runs.folder import named_runs

    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    asked: dict[str, Any] = {name: value for name, value in sampling.items() if value is not None}
    asked |= {"adapters": named_runs(adapter or ()), "adapter": use}
    served = {"port": port, "host": host, "votes": votes}
    if not web and any(value is not None for value in served.values()):
        raise InputError("--port, --host and --votes are for --web")
    if web and (prompt is not None or as_json):
        raise InputError("--web takes its prompts in the browser; leave --prompt and --json out")
    if prompt is None:
        hush_libraries()
        if web:
            from .commands.web import serve

            serve(target, system, overrides or (), max_new_tokens=max_new_tokens, **asked, **served)
        else:
            from .commands.talk import talk

            talk(target, system, max_new_tokens, overrides or (), **asked)
        return
    on_text = None if as_json else lambda piece: print(piece, end="", flush=True)
    answer = _run("chat", False, target, prompt, system, max_new_tokens, overrides or (), on_text, **asked)
    if as_json:
        _print_json({"answer": answer})
    else:
        print()


def main():
    """Run the command line and exit with its code."""
    process.run(app)
