"""One base in memory and several adapters on it: each answers by its name, as its run does when it is opened alone."""

from __future__ import annotations

import contextlib
import gc
import shlex
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ... import base_model
from ...data import chat
from ...data.masked_examples import encode_prompt
from ...evaluation import generate
from ...evaluation.sampling import Sampling
from ...runs.folder import RunDir
from ...system.errors import InputError
from ...system.events import note, progress
from ...system.usual_torch import usual_torch
from .checkpoint_run import finished, run_at
from .chosen_task import refuse_classes, refuse_images
from .opened_model import base_of, open_subject, open_tokenizer, task_of_target

BASE = "base"  # the name of the base alone
_NO_RUN = "not a run folder, and a model by itself has no adapters; open a run, and the others beside it"


@dataclass(frozen=True)
class _Voice:
    """What an adapter was trained to be asked with. run: where it is from, None for the base alone."""

    tokenizer: Any
    stops: set
    run: RunDir | None


class Routed:
    """A base model and adapters on it. Several threads may ask; one question is answered at a time.

    name: what was opened. default: the name that answers where none is given.
    """

    def __init__(self, name, model, voices, default, token_ids=()):
        """voices: {BASE: _Voice}; token_ids: new tokens of the base, whose rows an adapter has."""
        from ...methods.several import Several

        self.name, self.default = str(name), default
        self._several: Any = Several(model)
        self._voices, self._token_ids = voices, list(token_ids)
        self._lock, self._busy = threading.Lock(), None
        self._opened = contextlib.ExitStack()  # runs that checkpoints are as long as it is open

    @property
    def adapters(self):
        """The names of the adapters that are loaded, in that order."""
        return [name for name in self._voices if name != BASE]

    @usual_torch(alone=False)
    def answer(self, prompt, adapter=None, system=None, max_new_tokens=512, on_text=None, *, on_done=None, **sampling):
        """Return the answer to one prompt: a text, or messages [{"role", "content"}, ...] that end with a question.

        adapter: the name of the one that answers, "base" for the base alone; None: of the run that was opened. system: a
        system message before it. on_text(piece) is called with the text as it comes, on_done(evaluation.generate.Pace) at its
        end. sampling: temperature, top_p, top_k and seed of evaluation.sampling.Sampling; without them it is greedy.

        Raises:
            InputError: no such adapter, a conversation that its chat template refuses, or one that is too long; a setting that
                means nothing.
        """
        chosen = Sampling.of(max_new_tokens=max_new_tokens, **sampling)
        with self._alone():
            name = self._named(adapter)
            ids = self._encoded(name, prompt, system, max_new_tokens)
            return generate.stream(
                self._model(name),
                self._voices[name].tokenizer,
                ids,
                self._voices[name].stops,
                chosen,
                on_text or (lambda piece: None),
                lambda limit: note(f"\nanswer cut off: all {limit:,} positions of the model are used"),
                on_done,
            ).strip()

    @usual_torch(alone=False)
    def answers(self, prompts, adapter=None, system=None, max_new_tokens=512, batch_size=25):
        """Return the greedy answers to many prompts, in their order; those of an adapter are computed together.

        adapter: for all, as `answer` takes it; or a list with one for each prompt. In 16 bit, rows that are computed
        together may round differently from one alone.

        Raises:
            InputError: as `answer` does, before anything is computed.
        """
        if isinstance(prompts, str):
            raise InputError("answers takes a list of prompts; answer takes one")
        Sampling(max_new_tokens)
        if batch_size < 1:
            raise InputError(f"batch_size {batch_size}: at least 1")
        prompts = list(prompts)
        names = [adapter] * len(prompts) if adapter is None or isinstance(adapter, str) else list(adapter)
        if len(names) != len(prompts):
            raise InputError(
                f"{len(prompts)} prompts and {len(names)} names of adapters; give one for each, or one for all"
            )
        with self._alone():
            places_of: dict = {}
            for place, name in enumerate(names):
                places_of.setdefault(self._named(name), []).append(place)
            asked = {
                name: [self._encoded(name, prompts[place], system, max_new_tokens) for place in places]
                for name, places in places_of.items()
            }
            texts = [""] * len(prompts)
            for name, places in places_of.items():
                of = (self._model(name), self._voices[name].tokenizer, asked[name], self._voices[name].stops)
                for place, text in zip(places, generate.answers(*of, max_new_tokens, batch_size), strict=True):
                    texts[place] = text.strip()
        return texts

    def choose(self, name):
        """Let `name` answer where none is given.

        Raises:
            InputError: nothing of that name is loaded; or the base's own weights are changed, so that it cannot answer alone.
        """
        with self._alone():
            name = self._named(name)
            self._model(name)
            self.default = name

    @usual_torch()
    def load(self, name, path):
        """Load the adapter of the finished run or checkpoint in `path` as `name`; the base stays as it is in memory.

        Raises:
            InputError: the name is taken; no finished run on the same base with the same tokens, or an adapter that cannot
                lie beside others. Nothing has changed then.
        """
        with self._alone():
            self._refuse_closed()
            _refuse_name(name, self._voices)
            first = self._voices[BASE].run
            if first is None:
                raise InputError(f"{self.name}: {_NO_RUN}")
            with contextlib.ExitStack() as stack:
                self._add(name, _run_on(first, path, stack))
                self._opened.push(stack.pop_all())

    def _add(self, name, run):
        tokenizer = self._tokenizer_of(run)
        voice = _Voice(tokenizer, chat.stop_token_ids(tokenizer, self._several.base.generation_config), run)
        with progress(f"loading the adapter of {run.path}"):
            self._several.load(name, run.adapter, self._token_ids)
        self._voices[name] = voice

    def _tokenizer_of(self, run):
        """Return the run's tokenizer, with its own chat template; the embedding has rows for the tokens of the first run."""
        own = self._voices[BASE]
        if run is own.run:
            return own.tokenizer
        tokenizer, _ = open_tokenizer(run.adapter, run.recipe().model, self._several.base.generation_config)
        ours, theirs = own.tokenizer.get_vocab().items(), tokenizer.get_vocab().items()
        if ours != theirs:
            token, number = min(ours ^ theirs, key=lambda one: (one[1], one[0]))
            raise InputError(
                f"{run.path}: its tokenizer has other tokens than that of {own.run.path} ({len(ours ^ theirs)} differ, such "
                f"as {token!r} with id {number}); open it by itself: qlora chat {shlex.quote(str(run.path))}"
            )
        return tokenizer

    def unload(self, name):
        """Take an adapter out of memory; the base stays as it is.

        Raises:
            InputError: none of that name; or it has changed the base's own weights, so that it cannot be taken out.
        """
        with self._alone():
            if self._named(name) == BASE:
                raise InputError("the base cannot be unloaded, only adapters; close() frees all of it")
            self._several.unload(name)
            del self._voices[name]

    def find(self, path) -> str | None:
        """Return the name under which the run in folder `path` is loaded, or None."""
        there = RunDir(path).path.resolve()
        return next((name for name in self.adapters if self._voices[name].run.path.resolve() == there), None)

    def folder_of(self, name):
        """Return the folder of the adapter that is loaded as `name`."""
        return self._voices[name].run.adapter

    def close(self):
        """Free the base and all adapters; nothing can be asked any more."""
        with self._alone():
            self._several, self._voices = None, {}
            self._opened.close()
        gc.collect()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __repr__(self):
        return f"<{self.name}: {', '.join([*self.adapters, BASE]) if self._several else 'closed'}>"

    @contextlib.contextmanager
    def _alone(self):
        """Have the model for this thread while the block runs.

        Raises:
            InputError: this thread has it already: it is called with a piece of an answer.
        """
        if self._busy == threading.get_ident():
            raise InputError(f"{self.name} is answering; on_text cannot use it before that is done")
        with self._lock:
            self._busy = threading.get_ident()
            try:
                yield
            finally:
                self._busy = None

    def _model(self, name):
        """Return the model that answers as `name`."""
        return self._several.choose(None if name == BASE else name)

    def _encoded(self, name, prompt, system, max_new_tokens):
        """Return the token ids that `name` is shown before it answers; raises InputError if it cannot answer."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise InputError('a prompt is a text, or a list of messages, {"role": "user", "content": "..."}')
        messages = [*([] if system is None else [{"role": "system", "content": system}]), *messages]
        try:
            ids = encode_prompt(self._voices[name].tokenizer, messages)
        except ValueError as error:
            raise InputError(str(error)) from None
        generate.limit_of(self._model(name), ids, max_new_tokens)
        return ids

    def _named(self, name):
        """Return the name of what answers to `name`, None for the default."""
        self._refuse_closed()
        name = self.default if name is None else name
        if name not in self._voices:
            raise InputError(_no_adapter(name, self.adapters))
        return name

    def _refuse_closed(self):
        if self._several is None:
            raise InputError(f"{self.name} is closed; open it again")


def open_routed(target, adapters=None, adapter=None, overrides=()) -> Routed:
    """Return the Routed of a run, a checkpoint of one or a plain model; adapters: {name: run folder} on the same base.

    The adapter of the run that is opened is called like its folder. adapter: the name that answers where none is given, None
    for that. What is wrong is said before a weight is read. overrides: `section.field=value` laid over the run's recipe.

    Raises:
        InputError: as open_subject and Routed.load do.
    """
    adapters = adapters or {}
    if not isinstance(adapters, Mapping):
        raise InputError("adapters: takes names and run folders, {name: run folder}")
    task = task_of_target(target)
    refuse_images(task, "a conversation")
    refuse_classes(task, "a conversation", "; classify a text with --prompt TEXT")
    if run_at(target) is None:
        if adapters or adapter not in (None, BASE):
            raise InputError(f"{target}: {_NO_RUN}")
        subject = open_subject(target, overrides)
        return Routed(target, subject.model, {BASE: _Voice(subject.tokenizer, subject.stops, None)}, BASE)
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(finished(target, "open it"))
        own = run.path.resolve().name
        own = str(run.path.resolve()) if own == BASE else own
        runs = {own: run}
        for name, path in adapters.items():
            _refuse_name(name, runs)
            runs[name] = _run_on(run, path, stack)
        default = own if adapter is None else adapter
        if default not in (*runs, BASE):
            raise InputError(_no_adapter(default, runs))
        base = base_of(run, overrides)
        with progress(f"loading {base.checkpoint.name_or_path}"):
            model = base.load()
        voices = {BASE: _Voice(base.tokenizer, chat.stop_token_ids(base.tokenizer, model.generation_config), run)}
        routed = Routed(target, model, voices, default, base.checkpoint.new_tokens.values())
        for name, one in runs.items():
            routed._add(name, one)
        routed.choose(default)
        routed._opened = stack.pop_all()
    return routed


def _no_adapter(name, loaded):
    return f"no adapter called {name!r} is loaded; there are {', '.join([*loaded, BASE])}"


def _refuse_name(name, taken):
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"an adapter needs a name, a text; not {name!r}")
    if name == BASE:
        raise InputError(f"{BASE!r} is the name of the base alone; give the adapter another one")
    if name in taken:
        raise InputError(f"an adapter called {name!r} is loaded already; unload it, or give this one another name")


def _run_on(first, path, stack):
    """Return the finished run in `path`, of a checkpoint for as long as `stack` is open; raises InputError unless it was trained
    on the same base as the run `first`."""
    from ... import methods

    run = stack.enter_context(finished(path, "open it"))
    ours, theirs = (one.environment()["base_model"]["sha256"] for one in (first, run))
    problems = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    problems += [
        f"{field} is {there}, not {here}"
        for (field, here), there in zip(_loaded_as(first).items(), _loaded_as(run).values(), strict=True)
        if here != there
    ]
    if problems:
        raise InputError(
            f"{path}: trained on another base than {first.path} ({', '.join(problems)}); open it by itself: "
            f"qlora chat {shlex.quote(str(path))}"
        )
    methods.read_config(run.adapter)  # what is wrong with it is said before the tokenizer in it is read
    return run


def _loaded_as(run):
    """Return {field: value} of what the run's recipe says of how its base is loaded."""
    recipe = run.recipe()
    section = recipe.quantization
    found = {"task": recipe.task, "dtype": base_model.asked(recipe.model, section)}
    if section is None:
        return found | {"quantization": None, "use_double_quant": None}
    return found | {"quantization": section.quant_type, "use_double_quant": section.use_double_quant}


def _is_message(one):
    return isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
