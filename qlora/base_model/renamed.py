"""Tensors that transformers calls otherwise than the files: it renames those of older architectures while it reads them.

In transformers 5, ViT's `vit.encoder.layer.0.attention.attention.query.weight` is `vit.layers.0.attention.q_proj.weight`.
An export has the names that transformers itself saves, which are those of the files: every version of it opens them.
"""

from __future__ import annotations

from ..system import files


def names_in_files(checkpoint):
    """Return {tensor of the model for the checkpoint's task: its name in the files}, of those that are only renamed."""
    import torch
    from transformers import AutoConfig
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    if files.read_object(checkpoint.folder / "config.json").get(
        "auto_map"
    ):  # code of its own, which nothing is known of
        return {name: name for name in checkpoint.files}
    config, task = AutoConfig.from_pretrained(checkpoint.folder), checkpoint.task.file
    task.settle_config(config, checkpoint.task, checkpoint)
    with torch.device("meta"):
        model = task.auto_class().from_config(config, dtype=torch.float32)
    renamings = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)]
    state = model.state_dict()
    return {
        rename_source_key(name, renamings, [], model.base_model_prefix, state)[0]: name
        for name in sorted(checkpoint.files)
    }


def written_names(model):
    """Return {tensor of a model: its name where transformers saves it}, of those that differ."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightRenaming, apply_renamings

    # of names that are only read, such as LayerNorm.gamma, the new ones are written
    mapping = get_model_conversion_mapping(model, add_legacy=False)
    back = [
        one.reverse_transform()
        for one in reversed(mapping)
        if isinstance(one, WeightRenaming) and not isinstance(one, PrefixChange)
    ]
    found = {name: apply_renamings(name, back) for name in model.state_dict()}
    return {name: written for name, written in found.items() if name != written}
