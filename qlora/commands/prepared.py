"""What train and data share: everything up to, and without, reading a weight."""

from __future__ import annotations

import collections
from dataclasses import dataclass
from typing import Any

from .. import base_model, data
from ..data import chat
from ..errors import InputError
from ..recipe import Recipe
from . import console


@dataclass
class Prepared:
    """Model files found, rows read and tokenized. `template` says in words which chat template is used."""

    checkpoint: base_model.Checkpoint
    config: Any
    tokenizer: Any
    template: str
    sources: list
    conversations: list
    examples: list
    eval_examples: list
    packed: list | None
    report: dict


def prepare(recipe: Recipe) -> Prepared:
    """Read and tokenize the data of `recipe` for its model; raises InputError for whatever is wrong with either."""
    sources = data.read(recipe.data.train, recipe.data.columns)
    eval_sources = data.read(recipe.data.eval or [], recipe.data.columns)
    checkpoint = base_model.find(recipe.model)
    config = base_model.load_config(checkpoint, recipe.model)
    tokenizer = base_model.load_tokenizer(checkpoint.folder, recipe.model)
    template = chat.set_template(tokenizer, recipe.data.chat_template)
    base_model.add_tokens(tokenizer, recipe.model.new_tokens)

    conversations, held_out = data.hold_out(sources, recipe.data.eval_fraction, recipe.training.seed)
    held_out += [conversation for source in eval_sources for conversation in source.conversations]
    dropped = collections.defaultdict(collections.Counter)
    with console.status("tokenizing"):
        kept, examples = data.encode(conversations, tokenizer, recipe.data, dropped)
        kept_out, eval_examples = data.encode(held_out, tokenizer, recipe.data, dropped) if held_out else ([], [])
    _refuse_what_the_model_cannot_take(examples + eval_examples, config)
    packed = data.pack(examples, recipe.data.max_length) if recipe.data.packing else None
    report = data.report(
        [*sources, *eval_sources],
        examples,
        dropped,
        chat.stop_token_ids(tokenizer),
        recipe.training.per_device_train_batch_size * recipe.training.gradient_accumulation_steps,
        packed,
        recipe.data.max_length,
    )
    report |= data.copies(kept, kept_out)
    sources += eval_sources
    return Prepared(checkpoint, config, tokenizer, template, sources, kept, examples, eval_examples, packed, report)


def _refuse_what_the_model_cannot_take(examples, config):
    config = config.get_text_config()
    largest = max(max(example.input_ids) for example in examples)
    if largest >= config.vocab_size:
        raise InputError(
            f"the tokenizer makes token {largest}, the model has {config.vocab_size} embeddings; "
            "tokenizer and model do not belong together"
        )
    longest = max(len(example.input_ids) for example in examples)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise InputError(
            f"a row has {longest} tokens, the model {positions} positions; set data.max_length={positions}"
        )


def say_report(prepared: Prepared):
    """Print what the model will see, in four lines or so."""
    report = prepared.report
    tokens, length = report["tokens"], report["length"]
    for source in report["sources"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in source["reasons"].items())
        dropped = f", {source['rows_dropped']} dropped: {reasons}" if source["rows_dropped"] else ""
        console.say(f"data      {source['path']}: {source['rows_read']:,} rows ({source['format']}){dropped}")
    console.say(
        f"          {report['rows']:,} rows to train on, {len(prepared.eval_examples):,} held out; {tokens['total']:,} tokens, "
        f"{tokens['trained'] / tokens['total']:.0%} trained; length p50 {length['p50']}, p95 {length['p95']}, "
        f"max {length['max']}"
    )
    console.say(f"          {report['ends_with_stop_token']:.0%} of rows end with a stop token; {_copies(report)}")
    if prepared.packed is not None:
        longest = max(len(row.input_ids) for row in prepared.packed)
        console.say(
            f"packing   {report['rows']:,} rows into {len(prepared.packed):,} of up to {longest:,} tokens, "
            f"{report['packing_efficiency']:.0%} full"
        )
    console.say(f"template  {prepared.template}")


def _copies(report):
    found = [f"{report['duplicates']:,} copies of a row" if report["duplicates"] else "no row stands twice"]
    if report["eval_rows_in_training"]:
        found.append(f"{report['eval_rows_in_training']:,} HELD-OUT ROWS ARE TRAINED ON: their score means nothing")
    return "; ".join(found)
