"""qlora chat: talk to a run or a model."""

from __future__ import annotations

from ..evaluation.intervals import in_words
from ..evaluation.sampling import Sampling
from ..jobs.evaluating.class_scores import classes_of_text
from ..jobs.opening.chosen_task import refuse_images
from ..jobs.opening.opened_model import open_subject, task_of_target
from ..system.devices import say_device
from ..system.errors import InputError
from ..system.usual_torch import usual_torch
from ..terminal import shown
from .open import open


@shown()
@usual_torch()
def chat(
    target,
    prompt,
    system=None,
    max_new_tokens=512,
    overrides=(),
    on_text=None,
    *,
    adapters=None,
    adapter=None,
    **sampling,
) -> str:
    """Return the answer of a run or a model to one `prompt`; of a model with classes these, with their probabilities.

    target: a run folder, a checkpoint of one (RUN/checkpoints/step-N), a model folder or a hub name. on_text(piece) is called
    with the text as it comes. adapters: more runs on the same base, {name: run folder}. adapter: the one that answers, "base" for
    the base alone; None: that of `target`. sampling: temperature, top_p, top_k and seed; greedy without them.
    """
    Sampling.of(max_new_tokens=max_new_tokens, **sampling)
    task = task_of_target(target)
    if task.HAS_CLASSES:
        refuse_images(task, "a prompt")
        options = {"--system": system, "--adapter": adapters or adapter, ", ".join(sampling): sampling}
        for option, given in options.items():
            if given:
                raise InputError(f"{option} is for models that answer with words; this one answers with classes")
        say_device()
        found = classes_of_text(open_subject(target, overrides), prompt)
        answer = "\n".join(f"{label}  {in_words(value)}" for label, value in found.items())
        (on_text or (lambda piece: None))(answer)
        return answer
    with open(target, adapters, adapter, overrides) as model:
        return model.answer(prompt, None, system, max_new_tokens, on_text, **sampling)
