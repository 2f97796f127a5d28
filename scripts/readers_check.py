"""What transformers makes of exported models, and whether another version of it makes the same of them:

    python scripts/readers_check.py models/mine --save mine.json       # with the version that exported it
    python scripts/readers_check.py models/mine --compare mine.json    # with any other; needs torch and transformers alone

Several folders may be given. Looked at are: whether each tensor has its place, logits in float32, token numbers, the rendered
chat template, stop tokens, names of classes, and what transformers' pipeline answers. Prints a line a folder; exits with 1 if
one differs.
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

AT_MOST = 1e-4  # of the range of the logits: float32 summed in another order differs by 1e-6
TEXTS = [
    "What is 2 plus 3?",
    "  Grüße an 2 Käufer,\n\tim Wert von 12.50 €!",
    "def f(x):\n    return x",
    "很好 <|im_start|> 🙂",
]
TURNS = [
    {"role": "user", "content": TEXTS[0]},
    {"role": "assistant", "content": "5."},
    {"role": "user", "content": " {{a}} "},
]
KINDS = {
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForImageClassification": ("AutoModelForImageClassification", "image-classification"),
    "ForConditionalGeneration": ("AutoModelForImageTextToText", None),
    "": ("AutoModelForCausalLM", "text-generation"),
}


def read(folder):
    """Return what this version of transformers makes of a model folder, as plain values."""
    (architecture,) = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
    auto, task = next(kind for end, kind in KINDS.items() if architecture.endswith(end))
    named = "dtype" if version_of(transformers) >= (4, 56) else "torch_dtype"
    options = {named: torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    model, places = getattr(transformers, auto).from_pretrained(folder, **options)
    found = {"class": type(model).__name__, "parameters": sum(one.numel() for one in model.eval().parameters())}
    trained = dict(model.named_parameters())  # version 4 also misses buffers that the model computes
    found["missing"] = sorted(name for name in places["missing_keys"] if name in trained)
    found["not used"] = sorted(map(str, [*places["unexpected_keys"], *places["mismatched_keys"]]))
    if task == "image-classification":
        reader = transformers.AutoImageProcessor.from_pretrained(folder)
        inputs = [reader(picture(), return_tensors="pt")]
    else:
        reader = transformers.AutoTokenizer.from_pretrained(folder)
        found |= words(reader)
        inputs = [{"input_ids": torch.tensor([ids])} for ids in found["token ids"] if ids]
    with torch.no_grad():
        logits = [model(**one).logits[0] for one in inputs]
    found["logits"] = [(one if one.dim() == 1 else one[-1]).tolist() for one in logits]
    if task == "text-generation":
        found["stops at"] = stops(model, reader)
    elif task:
        found["classes"] = {str(key): name for key, name in model.config.id2label.items()}
    found["pipeline"] = answered(task, model, reader)
    return found


def words(tokenizer):
    """Return the token numbers of texts and how they read again, and the rendered chat template with its numbers."""
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    found = {"token ids": ids, "decoded": [tokenizer.decode(one) for one in ids]}
    found["special tokens"] = sorted(tokenizer.all_special_tokens)
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
        found |= {"prompt": text, "prompt ids": tokenizer(text, add_special_tokens=False)["input_ids"]}
    return found


def stops(model, tokenizer):
    ends = model.generation_config.eos_token_id
    return {"eos": ends if isinstance(ends, list) else [ends], "pad": tokenizer.pad_token_id}


def answered(task, model, reader):
    """Return what a pipeline of this model answers: a text, or names of classes with their scores."""
    if task is None:
        return None
    kind = "image_processor" if task == "image-classification" else "tokenizer"
    pipe = transformers.pipeline(task, model=model, device="cpu", **{kind: reader})
    if task == "text-generation":
        return pipe(TEXTS[0], max_new_tokens=12, do_sample=False)[0]["generated_text"]
    found = [pipe(picture(), top_k=3)] if task == "image-classification" else pipe(TEXTS[:2], top_k=None, batch_size=2)
    return [[one["label"], round(one["score"], 3)] for some in found for one in some]


def picture():
    from PIL import Image

    return Image.linear_gradient("L").resize((48, 40)).convert("RGB")


def version_of(package):
    return tuple(int(part) for part in package.__version__.split(".")[:2])


def differences(found, expected):
    """Return in words how two readings of a folder differ; [] if they say the same."""
    names = sorted((found.keys() | expected.keys()) - {"logits"})
    said = [
        f"{name}: {expected.get(name)!r} became {found.get(name)!r}"
        for name in names
        if found.get(name) != expected.get(name)
    ]
    here, there = (torch.tensor(one["logits"], dtype=torch.float64) for one in (found, expected))
    if here.shape != there.shape:
        return [*said, f"logits: {tuple(there.shape)} became {tuple(here.shape)}"]
    most, spread = (here - there).abs().max().item(), (there.max() - there.min()).item()
    return said if most <= AT_MOST * spread else [*said, f"logits: {most:.2g} apart, of a range of {spread:.2g}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="exported models")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--save", type=Path, metavar="FILE", help="write what is read in them")
    what.add_argument("--compare", type=Path, metavar="FILE", help="compare with what another version has written")
    given = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    said = {"transformers": transformers.__version__, "torch": torch.__version__}
    if given.save:
        said["folders"] = {str(folder.resolve()): read(folder) for folder in given.folders}
        given.save.write_text(json.dumps(said), encoding="utf-8")
        print(f"transformers {transformers.__version__}: {len(given.folders)} folders read, {given.save} written")
        return
    expected = json.loads(given.compare.read_text(encoding="utf-8"))
    failed = False
    for folder in given.folders:
        try:
            problems = differences(read(folder), expected["folders"][str(folder.resolve())])
        except Exception as error:  # what another version raises is what is asked for here
            problems = [f"{type(error).__name__}: {error}"]
        failed |= bool(problems)
        print(f"{folder}: {'DIFFERS' if problems else 'the same'}", *problems, sep="\n  ", flush=True)
    print(f"transformers {transformers.__version__}, compared with {expected['transformers']}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
