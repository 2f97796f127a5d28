"""What is trained moves in the first step, and AdaLoRA's ranks shrink as in PEFT's own loop."""

import json

import pytest
import torch

from qlora import base_model, methods
from qlora.recipe import Adalora
from qlora.system.errors import InputError, TrainingFailed
from qlora.training.master_weights import MasterWeights
from tests.conftest import encode, messages, some_slow
from tests.training.conftest import UNEVEN, records, trained


def test_a_run_whose_adapters_do_not_move_stops(fit, monkeypatch):
    monkeypatch.setattr(MasterWeights, "give_weights", lambda self: None)
    with pytest.raises(TrainingFailed, match="14 of 14 adapters did not move in the first step"):
        fit(max_steps=3)


ADALORA = Adalora(lora_alpha=64, init_r=6, target_r=3, tinit=1, tfinal=2)


def singular_values(model):
    return {name: p.detach().flatten() for name, p in model.named_parameters() if ".lora_E." in name}


@pytest.mark.parametrize("family", some_slow(["llama", "gpt2"], ["gpt2"]))
def test_ranks_shrink_to_the_target_on_average_and_what_is_pruned_is_zero(fit, family, tmp_path):
    model, _, run = fit(family=family, lora=ADALORA, max_steps=8, per_device_train_batch_size=8)
    values = singular_values(model)
    ranks = [int((tensor != 0).sum()) for tensor in values.values()]
    assert sum(ranks) == 3 * len(values)
    assert len(set(ranks)) > 1  # shared out by importance
    mean_ranks = [record["mean_rank"] for record in records(run)]
    assert mean_ranks[0] == 6
    assert mean_ranks == sorted(mean_ranks, reverse=True)
    assert mean_ranks[-3:] == [3, 3, 3]
    methods.save(model, tmp_path / "adapter", "base", None)
    pattern = json.loads((tmp_path / "adapter" / methods.CONFIG).read_text())["rank_pattern"]
    assert {name: sum(kept) for name, kept in pattern.items()} == {
        name.removeprefix("base_model.model.").removesuffix(".default"): int((tensor != 0).sum())
        for name, tensor in values.items()
    }


@pytest.mark.parametrize("accumulation", some_slow([1, 4], [1]))
def test_adalora_takes_the_steps_of_pefts_own_loop(fit, load_model, tokenizer, accumulation):
    from peft import AdaLoraConfig, get_peft_model

    rows = UNEVEN[:8]
    # PEFT's documented loop, on PEFT's loss (which has the penalty in it), one row of all a step
    examples = [encode(tokenizer, messages(turns)) for turns in rows]
    length = max(len(example.input_ids) for example in examples)

    def padded(values, fill):
        return torch.tensor([[*row, *[fill] * (length - len(row))] for row in values])

    ids, labels = padded([e.input_ids for e in examples], 0), padded([e.labels for e in examples], -100)
    mask = padded([[1] * len(e.input_ids) for e in examples], 0)
    base = base_model.to_float32(load_model("llama"))
    names = base_model.linear_names(base)
    torch.manual_seed(0)
    reference = get_peft_model(base, AdaLoraConfig(init_r=6, target_r=3, lora_alpha=64, tinit=1, tfinal=2, total_step=6,
                                                   target_modules=names, task_type="CAUSAL_LM"))  # fmt: skip
    start = trained(methods.attach(base_model.to_float32(load_model("llama")), ADALORA))
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(start[name])
    optimizer = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    reference.train()
    losses = []
    for step in range(1, 7):
        loss = reference(input_ids=ids, attention_mask=mask, labels=labels).loss
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in reference.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        reference.base_model.update_and_allocate(step)
        optimizer.zero_grad()

    model, _, run = fit(rows, lora=ADALORA, float32=True, max_steps=6, optim="adamw_torch",
                        per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation)  # fmt: skip
    found, expected = singular_values(model), singular_values(reference)
    for name, tensor in expected.items():
        assert torch.equal(found[name] != 0, tensor != 0), name
        torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=1e-2)
    # the logged loss is the cross entropy alone; at the start it is the base's, as E is 0
    with reference.disable_adapter(), torch.no_grad():
        entropy = reference(input_ids=ids, attention_mask=mask, labels=labels, return_dict=False)[0].item()
    assert records(run)[0]["loss"] == pytest.approx(entropy, rel=1e-4)
    assert losses[0] > entropy + 0.5


def test_a_schedule_without_a_step_to_shrink_in_is_refused(fit):
    with pytest.raises(InputError, match=r"adalora.tinit 1 and adalora.tfinal 2 leave none of 3 steps"):
        fit(lora=ADALORA, max_steps=3)
