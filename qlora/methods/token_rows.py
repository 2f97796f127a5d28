"""PEFT's layer of trainable tokens, computed so that only the rows get a gradient; saved, loaded and merged as PEFT does."""

from __future__ import annotations

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import TrainableTokensWrapper

from ..kernels import token_rows


class TokenRows(TrainableTokensLayer):
    """ids: (R,), of the one adapter; places: (V,), which of them a token is, R if none; rows: (R, H), None while the adapter is
    off, merged, or not alone: then PEFT's own forward computes."""

    @property
    def rows(self):
        names = self.active_adapters
        if self.disable_adapters or self.merged or list(names) != [self.of]:
            return None
        return self.trainable_tokens_delta[self.of]

    def forward_adapters(self, x, active_adapters, *args, **kwargs):
        rows, base = self.rows, self.base_layer
        if rows is None or list(active_adapters) != [self.of]:
            return super().forward_adapters(x, active_adapters, *args, **kwargs)
        if isinstance(base, torch.nn.Linear):
            return token_rows.Head.apply(x, base.weight, rows, self.ids)
        scale = self._get_embed_scale()  # Gemma's embeddings are multiplied on the way out
        rows = rows if scale is None else rows * scale.to(rows.dtype)
        return token_rows.Embedded.apply(rows, base(x), self.places[x])


_NAME = "default"  # of the adapter, as PEFT calls one


def install(model):
    """Let the rows of new tokens of a PEFT model be computed by TokenRows."""
    for module in model.modules():
        layer = module.token_adapter if isinstance(module, TrainableTokensWrapper) else None
        # an embedding with max_norm changes rows as it reads them
        if layer is None or getattr(layer.base_layer, "max_norm", None) is not None:
            continue
        weight, ids = layer.base_layer.weight, torch.tensor(layer.token_indices[_NAME])
        places = torch.full((len(weight),), len(ids), dtype=torch.int32)
        places[ids] = torch.arange(len(ids), dtype=torch.int32)
        layer.__class__, layer.of = TokenRows, _NAME
        layer.register_buffer("ids", ids.to(weight.device), persistent=False)
        if not isinstance(layer.base_layer, torch.nn.Linear):
            layer.register_buffer("places", places.to(weight.device), persistent=False)
