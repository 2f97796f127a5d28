"""The lines of code in an adapter's model card open it with plain PEFT, as the model that was trained."""

import re
from pathlib import Path

import pytest
import torch

from qlora import base_model
from qlora.commands.train import train
from qlora.jobs.exporting.push_files import files_to_push
from qlora.jobs.opening.opened_model import open_subject
from tests.conftest import some_slow


def as_the_card_says(files, folder, base):
    """Return the model that the lines of code in README.md open; files: {name: content} of what was pushed, without a base."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else Path(content).read_bytes())
    code = re.search(r"## Use\n\n((?:    .*\n|\n)+)", (folder / "README.md").read_text())[1]
    code = re.sub(r"^    ", "", code, flags=re.MULTILINE)
    names: dict = {}
    exec(code.replace("me/mine", str(folder)).replace("owner/base", str(base)), names)
    return names["model"].eval()


METHODS = {
    "ia3": ("llama", {"ia3": {}}),
    "ia3 of GPT-2": ("gpt2", {"ia3": {}}),
    "ia3, 16 bit": ("llama", {"ia3": {}, "quantization": None}),
    "dora": ("llama", {"lora": {"r": 4, "use_dora": True}}),
    "pattern": ("llama", {"lora": {"r": 4, "use_rslora": True, "rank_pattern": {"q_proj": 8}}}),
    "biases": ("qwen2", {"lora": {"r": 4, "bias": "all"}}),
    "head": ("llama-tied", {"lora": {"r": 4, "modules_to_save": ["lm_head"]}}),
    "hira": ("llama", {"hira": {"r": 4}}),
    "oft": ("llama", {"oft": {}}),
    "prefix_tuning": ("qwen2", {"prefix_tuning": {"num_virtual_tokens": 4, "prefix_projection": True}}),
    "prompt_tuning": ("llama", {"prompt_tuning": {"num_virtual_tokens": 4}}),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # it is untied on purpose
@pytest.mark.usefixtures("unplanned")
@pytest.mark.parametrize("case", some_slow(METHODS, but=["ia3"]))
def test_the_cards_lines_of_code_open_an_adapter_of_each_method_on_nf4(make_recipe, tmp_path, case):
    family, sections = METHODS[case]
    recipe = make_recipe(family, **sections, training={"max_steps": 3, "learning_rate": 3e-2})
    run = train(recipe)
    files = files_to_push(run.path, "me/mine", "owner/base", None)
    opened = as_the_card_says(files, tmp_path / "downloaded", recipe.model.name_or_path)
    live, ids = open_subject(run.path).model, torch.arange(4, 60)[None]
    mask = torch.ones_like(ids)
    with torch.no_grad():
        expected, found = (model(ids, attention_mask=mask).logits[:, -56:].float() for model in (live, opened))
        base_model.to_float32(live), base_model.to_float32(opened)
        exact, same = (model(ids, attention_mask=mask).logits[:, -56:] for model in (live, opened))
        with live.disable_adapter():
            without = live(ids).logits
    assert (found - expected).abs().max() < 0.15  # bfloat16 has steps of 1/32 there
    assert (same - exact).abs().max() < 1e-4 * (exact - without).abs().max()
