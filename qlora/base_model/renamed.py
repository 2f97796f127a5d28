"""Tensors that transformers calls otherwise than the files: it renames those of older architectures while it reads them.

In transformers 5, ViT's `vit.encoder.layer.0.attention.attention.query.weight` is `vit.layers.0.attention.q_proj.weight`.
An export has the names of the files, which every version of transformers opens.
"""

from __future__ import annotations


def names_in_files(checkpoint):
    """Return {tensor of the model for the checkpoint's task: its name in the files}, of those that are only renamed."""
    import torch
    from transformers import AutoConfig
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

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
