"""model.new_tokens: in the tokenizer, as rows of embedding and head, and where those rows start."""

from __future__ import annotations

import torch

from ..system.errors import InputError


def add_tokens(tokenizer, tokens, template=None):
    """Return {token: id} of `tokens` (None: no tokens), after adding to `tokenizer` those that are not one token there.

    An added token that stands in the chat template (`template`, or the tokenizer's own) is special, which decoded answers
    leave out; the others they keep.

    Raises:
        InputError: two of them are the same token to this tokenizer.
    """
    from transformers import AddedToken

    template, ids = template or str(tokenizer.chat_template or ""), {}
    for token in tokens or ():
        found = tokenizer(token, add_special_tokens=False).input_ids
        if len(found) != 1 or (found[0] == tokenizer.unk_token_id and token != tokenizer.unk_token):
            special = token in template
            tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)], special_tokens=special)
            found = [tokenizer.convert_tokens_to_ids(token)]
        same = next((other for other, number in ids.items() if number == found[0]), None)
        if same is not None:
            raise InputError(f"model.new_tokens: to this tokenizer {same!r} and {token!r} are one token; keep one")
        ids[token] = found[0]
    return ids


@torch.no_grad()
def add_rows(model, added, num_rows):
    """Grow embedding and head to `num_rows`; set these rows and the spare ones of `added` ids to the mean of all before.

    A new token then starts out about as likely as the average one, where a random or an unused row would be anywhere:
    https://nlp.stanford.edu/~johnhew/vocab-expansion.html. The mean is taken in float32 and has no random part.
    """
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    means = [layer.weight.mean(0, dtype=torch.float32) for layer in layers]
    num_before = layers[0].weight.shape[0]
    if num_rows > num_before:
        model.resize_token_embeddings(num_rows, mean_resizing=False)
    ids = sorted(added.union(range(num_before, num_rows)))
    for layer, mean in zip([model.get_input_embeddings(), model.get_output_embeddings()], means, strict=True):
        layer.weight[ids] = mean.to(layer.weight.dtype)


def token_modules(model):
    """Return the names of the modules that have a row a token: the embedding, and the head if it is not tied to that.

    Raises:
        InputError: PEFT cannot train single rows of them.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or not isinstance(embedding, torch.nn.Embedding):
        raise InputError(
            f"model.new_tokens: {type(model).__name__} has no plain embedding and head whose rows could be trained"
        )
    if head.bias is not None:  # TrainableTokensLayer computes F.linear(x, W): peft 0.21
        raise InputError(
            f"model.new_tokens: the head of {type(model).__name__} has a bias, which PEFT loses where it trains rows; "
            "leave model.new_tokens out, or take another model"
        )
    names = {module: name for name, module in model.named_modules()}
    return [names[embedding], *([] if head.weight is embedding.weight else [names[head]])]
