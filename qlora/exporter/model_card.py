"""The README.md of what leaves this machine, an exported model or an adapter: made of what, how, and what was measured."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from .. import base_model, methods
from ..base_model import text_generation
from ..system.errors import InputError

HERE = "FOLDER"  # stands for where the files are, until that is known

_HEAD = """\
---
library_name: {{ library }}
pipeline_tag: {{ "image-text-to-text" if kept_tensors and library == "transformers" else task }}
{%- if hub_name %}
base_model: {{ hub_name }}
base_model_relation: {{ relation }}
{%- endif %}
{%- if datasets %}
datasets: [{{ datasets | join(", ") }}]
{%- endif %}
tags: [{{ tags }}]
---

# {{ title }}

"""

_MODEL = """\
{% if report.int8 is defined -%}
A model in dynamic int8 for CPUs: `{{ base }}` with a {{ kind }} adapter merged into its weights, whose linear layers \
are stored in int8, all else in {{ report.int8.dtype_beside }}. It needs the package torchao.
{%- else -%}
A full-precision model: `{{ base }}` with a {{ kind }} adapter merged into its weights, stored in {{ report.dtype }}.
{%- endif %}
{%- if kept_tensors %}
Only its text half was trained: the other {{ kept_tensors }} tensors (images) are those of the base, bit for bit.
{%- endif %}
{% if report.base == "dequantized" %}
The adapter was trained on the 4-bit weights of the base, and that is what it is merged with: each adapted weight is
`{{ formula }}`, added in float32 and cast once.
{% else %}
The adapter was trained on {% if quantized %}the 4-bit weights of the base, and is merged here with its original
weights{% else %}these weights{% endif %}: each adapted weight is `{{ formula }}`, added in float32 and cast once.
{% endif %}
## Is it the model that was trained?
{% if report.verified %}
{% if report.live_model == "assumed" -%}
Unknown: the adapter does not record how its base was quantized in training. The export matches the assumed
model, measured
{%- else -%}
Yes, measured
{%- endif %} ({{ report.verify }}) on {{ report.rows.count }} {{ report.rows.from }}{% if not labels %}, \
{{ report.rows.positions }} positions{% endif %}:

{% if labels -%}
| | loss | logits apart | KL to the trained model | same class |
{% else -%}
| | loss | perplexity | KL to the trained model | same top-1 |
{% endif -%}
|---|---|---|---|---|
{% for row in rows -%}
| {{ row | join(" | ") }} |
{% endfor -%}
{% if report.base == "original" %}
This is the adapter on the original weights. The model that was trained is in the first line, and the KL shows how far apart
the two are.
{% endif -%}
{% else %}
**Not verified**: the proof was switched off (export.verify: off).
{% endif %}
`export_report.json` has the numbers of every module.

## Use
{% if labels %}
    from transformers import pipeline

    classify = pipeline("{{ task }}", "{{ here }}")
    classify({{ '"image.jpg"' if of_images else '"a text"' }})

Its {{ labels | length }} classes, in the order of the logits: {{ labels | join(", ") }}.
{% else %}
    from transformers import {{ auto }}, AutoTokenizer

    model = {{ auto }}.from_pretrained("{{ here }}", dtype="auto", device_map="auto")
    tokenizer = AutoTokenizer.from_pretrained("{{ here }}")

The chat template in this folder is the one of the training; the tokens that end an answer are in
`generation_config.json`.
{% endif %}"""

_ADAPTER = """\
A {{ kind }} adapter for `{{ base }}`, {% if quantized -%}
trained on its weights in 4 bit ({{ quantized }}): on the original weights it answers otherwise.
{%- else %}trained on its 16-bit weights.{% endif %}
{% if rows %}
| | loss | perplexity | KL to the trained model | same top-1 |
|---|---|---|---|---|
{% for row in rows -%}
| {{ row | join(" | ") }} |
{% endfor %}
{% endif %}
## Use
{% if not peft %}
PEFT has no such adapters, qlora loads them:

    from qlora import methods
    from transformers import {{ auto }}, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("{{ here }}")
    base = {{ auto }}.from_pretrained("{{ base }}"{% if revision %}, revision="{{ revision }}"{% endif %}, dtype="auto")
    model = methods.load(base, "{{ here }}")
{% elif kept_tensors %}
It belongs to the text half of a multimodal model, whose layers it names as a text-only model has them. Merge it:

    qlora export THIS_FOLDER --model {{ base }} --out MERGED
{% else %}
    import torch
    from peft import PeftModel
    from transformers import {{ auto }}, {{ reader }}{% if four_bit %}, BitsAndBytesConfig{% endif %}

    {% if four_bit -%}
    four_bit = BitsAndBytesConfig({{ four_bit }})
    {% endif -%}
    {{ "processor" if of_images else "tokenizer" }} = {{ reader }}.from_pretrained("{{ here }}")
    base = {{ auto }}.from_pretrained(
        "{{ base }}"{% if revision %}, revision="{{ revision }}"{% endif %}, dtype=torch.bfloat16{% if four_bit %}, \
quantization_config=four_bit{% endif %}{% if labels %}, num_labels={{ labels | length }}{% endif %}
    )
{%- if num_tokens %}
    num_rows = max({{ num_tokens }}, base.get_input_embeddings().num_embeddings)
    base.resize_token_embeddings(num_rows, mean_resizing=False)
{%- endif %}
    model = PeftModel.from_pretrained(base, "{{ here }}"){% if cast %}.float()  # PEFT's (IA)3 gives float32 on 4 bit{% endif %}
{% endif %}
{% if labels -%}
Its {{ labels | length }} classes, in the order of the logits: {{ labels | join(", ") }}. The head is in the adapter.
{%- else -%}
The chat template in this folder is the one of the training.
{%- endif %}
"""

_ORIGIN = """
## Training{% if several %}: {{ origin.name }}{% endif %}

Base: {% if hub_name %}[{{ hub_name }}](https://huggingface.co/{{ hub_name }}){% else %}`{{ base }}`{% endif -%}
{% if origin.base.revision %}, revision `{{ origin.base.revision }}`{% else %}, read from a folder{% endif %}.

| file of the base | SHA-256 |
|---|---|
{% for name, digest in origin.base.sha256.items() -%}
| {{ name }} | `{{ digest }}` |
{% endfor %}
| data | SHA-256 |
|---|---|
{% for name, digest in origin.data -%}
| {{ name }} | `{{ digest }}` |
{% endfor %}
{{ origin.counts }}
{% if origin.measured %}
| measured | before | after |
|---|---|---|
{% for row in origin.measured -%}
| {{ row | join(" | ") }} |
{% endfor %}
{%- endif %}
Settings, as in the recipe:
{% for line in origin.settings.splitlines() %}
    {{ line }}
{%- endfor %}

Made with {% for name, version in origin.versions.items() %}{{ name }} {{ version }}{{ ", " if not loop.last }}{% endfor %}, \
on {{ origin.device }}.
"""


@dataclass(frozen=True)
class Origin:
    """What is known of a training.

    name: of the run. base: {"name_or_path", "revision", "sha256": {file: digest}}. data: [(name, SHA-256)], without the
    folders of this machine. datasets: those of the hub among them. counts: rows and steps, in words. measured: rows of
    text, [what, before, after]. settings: sections of the recipe as YAML. versions: {package: version}.
    """

    name: str
    base: dict
    data: list
    datasets: list
    counts: str
    measured: list
    settings: str
    versions: dict
    device: str


def card(title, base, adapter_config, report, quantized, rows, origins=(), task=text_generation):
    """Return the text of README.md of an exported model; HERE stands where its folder or hub name belongs.

    base: what the base model was called; a path of this machine is cut to its last part. rows: the lines of the table
    that was shown, cells as text. origins: the trainings that it comes from, as far as they are known.
    """
    described = methods.describe(adapter_config)
    weight = f"dequantize({quantized}(W))" if quantized and report["base"] == "dequantized" else "W"
    return _rendered(
        _MODEL,
        title,
        base,
        origins,
        library="transformers",
        relation="finetune",
        tags="qlora, merged",
        kind=described.kind,
        formula=described.formula.format(W=weight),
        quantized=quantized,
        report=report,
        rows=rows,
        kept_tensors=report.get("kept_tensors"),
        auto=task.auto_name(multimodal=bool(report.get("kept_tensors"))),
        labels=report.get("labels"),
        of_images=not task.HAS_TOKENS,
        task=task.NAME,
    )


def adapter_card(title, base, adapter_config, quantization, origin, task=base_model.GENERATION, rows=()):
    """Return the text of README.md of an adapter, with HERE as `card` has it.

    quantization: {"quant_type", "use_double_quant", "compute_dtype"} or None. rows: as `card` has it.
    """
    described = methods.describe(adapter_config)
    trained_tokens = adapter_config.get("trainable_token_indices") or {}
    indices = trained_tokens.values() if isinstance(trained_tokens, dict) else [trained_tokens]
    four_bit = None
    if quantization is not None and not origin.base["prequantized"]:  # such a folder says so itself
        four_bit = (
            f'load_in_4bit=True, bnb_4bit_quant_type="{quantization["quant_type"]}", '
            f"bnb_4bit_use_double_quant={quantization['use_double_quant']}, "
            f"bnb_4bit_compute_dtype=torch.{quantization['compute_dtype']}"
        )
        if task.labels:  # the head, which would be quantized otherwise
            four_bit += f", llm_int8_skip_modules={sorted(adapter_config['modules_to_save'])}"
    return _rendered(
        _ADAPTER,
        title,
        base,
        [origin],
        library="peft" if described.peft else "qlora",
        relation="adapter",
        tags=f"qlora, {adapter_config['peft_type'].lower()}",
        kind=described.kind,
        peft=described.peft,
        cast=adapter_config["peft_type"] == "IA3" and quantization is not None,  # methods/ia3.py says why
        rows=rows,
        quantized=quantization and quantization["quant_type"].upper(),
        four_bit=four_bit,
        revision=origin.base["revision"],
        kept_tensors=origin.base.get("kept_tensors"),
        auto=task.file.auto_name(),
        reader="AutoTokenizer" if task.file.HAS_TOKENS else "AutoImageProcessor",
        of_images=not task.file.HAS_TOKENS,
        labels=task.labels,
        task=task.name,
        num_tokens=1 + max((max(some) for some in indices if some), default=-1),
    )


def shown_name(base):
    """Return (what a base is called away from this machine, its name on the hub or None)."""
    base = str(base)
    is_local = Path(base).exists() or base.startswith(("/", ".", "~")) or base.count("/") != 1
    return (Path(base).name, None) if is_local else (base, base)


def addressed(text, repo, base=None, license=None):
    """Return a card for `repo` on the hub: HERE replaced, and base (a hub name) and license in its metadata.

    Raises:
        InputError: it has no metadata, or says something else there; or that is no license.
    """
    if license is not None and re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license) is None:
        raise InputError(f"--license {license!r} is not the id of a license, such as apache-2.0, llama3.1 or other")
    parts = re.match(r"---\n(.*?\n)---\n", text, re.DOTALL)
    if parts is None:
        raise InputError("README.md does not begin with metadata between two lines of ---; export again")
    head = parts[1]
    for key, value in (("base_model", base), ("license", license)):
        found = re.search(rf"^{key}: *(.*)$", head, re.MULTILINE)
        if value is not None and found is not None and found[1].strip() != value:
            raise InputError(f"README.md says {key}: {found[1].strip()}, which is not {value}; change one of them")
        if value is not None and found is None:
            head += f"{key}: {value}\n"
    return f"---\n{head}---\n" + text[parts.end() :].replace(f'"{HERE}"', f'"{repo}"')


def _rendered(text, title, base, origins, **values):
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    shown, hub_name = shown_name(base)
    datasets = sorted({name for origin in origins for name in origin.datasets})
    values |= {"title": title, "base": shown, "hub_name": hub_name, "datasets": datasets, "here": HERE}
    parts = [_HEAD, text, *([_ORIGIN] * len(origins))]
    more = [{}, {}, *({"origin": origin, "several": len(origins) > 1} for origin in origins)]
    return "".join(
        environment.from_string(part).render(**values, **extra) for part, extra in zip(parts, more, strict=True)
    )
