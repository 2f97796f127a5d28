"""The README.md of an exported model: what it was made of, how, and what was measured."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, StrictUndefined

_TEXT = """\
---
library_name: transformers
pipeline_tag: text-generation
{%- if hub_name %}
base_model: {{ hub_name }}
base_model_relation: finetune
{%- endif %}
tags: [qlora, merged]
---

# {{ title }}

A full-precision model: {{ base }} with a {{ kind }} adapter merged into its weights, stored in {{ report.dtype }}.
{% if report.base == "dequantized" %}
The adapter was trained on the 4-bit weights of the base, and that is what it is merged with: each adapted weight is
`{{ formula }}`, added in float32 and cast once.
{% else %}
The adapter was trained on {% if quantized %}the 4-bit weights of the base, and is merged here with its original
weights{% else %}these weights{% endif %}: each adapted weight is `{{ formula }}`, added in float32 and cast once.
{% endif %}
## Is it the model that was trained?
{% if report.verified %}
Yes, measured ({{ report.verify }}) on {{ report.rows.count }} {{ report.rows.from }}, {{ report.rows.positions }} positions:

| | loss | KL to the trained model | same top-1 |
|---|---|---|---|
{% for row in rows -%}
| {{ row | join(" | ") }} |
{% endfor -%}
{% if report.base == "original" %}
It is the adapter on the original weights, exactly; the model that was trained is the first line, and the KL says how far
the two are apart.
{% endif -%}
{% else %}
**Not verified**: the export was told to leave the proof out.
{% endif %}
`export_report.json` has the numbers of every module.

## Use

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto", device_map="auto")
    tokenizer = AutoTokenizer.from_pretrained("FOLDER")

The chat template in this folder is the one of the training; the tokens that end an answer are in
`generation_config.json`.
"""


def card(title, base, adapter_config, report, quantized, rows):
    """Return the text of README.md.

    base: what the base model was called; a path of this machine is cut to its last part. rows: the lines of the table
    that was shown, cells as text.
    """
    base = str(base)
    local = Path(base).exists() or base.startswith(("/", ".", "~"))
    kind = {"ADALORA": "AdaLoRA"}.get(adapter_config["peft_type"], "DoRA" if adapter_config.get("use_dora") else "LoRA")
    weight = f"dequantize({quantized}(W))" if quantized and report["base"] == "dequantized" else "W"
    merged = f"{weight} + s B A"
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(_TEXT)
    return template.render(
        title=title,
        hub_name=None if local else base,
        base=Path(base).name if local else base,
        kind=kind,
        formula=f"m * ({merged}) / |{merged}|" if kind == "DoRA" else merged,
        quantized=quantized,
        report=report,
        rows=rows,
    )
