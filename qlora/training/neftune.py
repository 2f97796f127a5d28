"""NEFTune: noise on the input embeddings while a model trains."""

from __future__ import annotations

import contextlib
import math

import torch

# B batch, T tokens, D width of the embeddings


@contextlib.contextmanager
def noisy_embeddings(model, alpha):
    """Add noise to the input embeddings while the block runs and the model is in training mode.

    Every number of a document of L tokens gets uniform(-1, 1) * alpha / sqrt(L * D), drawn from torch's global generator.
    L is the length of the document alone, from the `segments` of a packed row or from the attention mask, and padding
    gets no noise: what else is in the batch does not matter. transformers' own hook takes the width of the batch for L.

    Source: Jain et al., NEFTune: Noisy Embeddings Improve Instruction Finetuning, 2023 (arXiv:2310.05914), algorithm 1.
    """
    batch = {}

    def note(module, args, kwargs):
        batch.update(segments=kwargs.get("segments"), mask_BT=kwargs.get("attention_mask"))

    def add_noise(embedding, args, output_BTD):
        if not embedding.training:
            return output_BTD
        size_BT = alpha / math.sqrt(output_BTD.shape[-1]) * _per_root_of_length(output_BTD, **batch)
        noise_BTD = torch.empty_like(output_BTD, dtype=torch.float32).uniform_(-1, 1) * size_BT[..., None]
        return output_BTD + noise_BTD.to(output_BTD.dtype)

    handles = [
        model.register_forward_pre_hook(note, with_kwargs=True),
        model.get_input_embeddings().register_forward_hook(add_noise),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _per_root_of_length(embeddings_BTD, segments, mask_BT):
    """Return 1 / sqrt(L) of each token's document, 0 where there is padding: float32, (B, T)."""
    if segments is not None:
        lengths = torch.tensor(segments)
        return lengths.rsqrt().repeat_interleave(lengths)[None].to(embeddings_BTD.device)
    if mask_BT is None:
        mask_BT = torch.ones_like(embeddings_BTD[..., 0])
    mask_BT = mask_BT.float()
    return mask_BT * mask_BT.sum(1, keepdim=True).rsqrt()
