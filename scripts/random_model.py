"""Write a model folder of a known shape with random weights: right for time and memory, not for losses.

    python scripts/random_model.py --shape mistral-7b --tokenizer FOLDER --out FOLDER

The tokenizer is copied from another model folder and sets the vocabulary, so no hub is needed. Weights are drawn tensor by
tensor and streamed to disk; memory stays below a gigabyte.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config

from qlora.exporter.writer import Spec, write

SHAPES = {
    "tiny": lambda vocab: LlamaConfig(
        vocab_size=vocab, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
    ),
    "mistral-7b": lambda vocab: MistralConfig(vocab_size=vocab, sliding_window=None),
    "llama-1b": lambda vocab: LlamaConfig(
        vocab_size=vocab,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
    ),
    "llama-3.1-8b": lambda vocab: LlamaConfig(
        vocab_size=vocab,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
    ),
    # small ones, with the vocabulary of their own and tied tables
    "qwen2.5-0.5b": lambda vocab: Qwen2Config(
        vocab_size=max(vocab, 151936),
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
    ),
    "gemma-3-270m": lambda vocab: Gemma3TextConfig(
        vocab_size=max(vocab, 262144),
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
    ),
    "llama-3.2-1b": lambda vocab: LlamaConfig(
        vocab_size=max(vocab, 128256),
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
    ),
}
TIED = ("qwen2.5-0.5b", "gemma-3-270m", "llama-3.2-1b")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument(
        "--vocab-size", type=int, help="embeddings, where the tokenizer has fewer tokens than the model"
    )
    parser.add_argument("--layers", type=int, help="fewer or more than the shape has")
    parser.add_argument("--untied", action="store_true", help="a head of its own, where the shape has none")
    parser.add_argument("--config-only", action="store_true", help="no weights: enough for qlora plan")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    config = SHAPES[args.shape](max(len(tokenizer), args.vocab_size or 0))
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id, config.dtype = tokenizer.pad_token_id, torch.bfloat16
    config.tie_word_embeddings = args.shape in TIED and not args.untied
    if args.layers is not None:
        config.num_hidden_layers = args.layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: args.layers]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures = [type(model).__name__]
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def draw(name):
        if len(shapes[name]) == 1:
            yield torch.ones(shapes[name], dtype=torch.bfloat16)
            return
        rows, width = shapes[name]
        for start in range(0, rows, 1024):
            yield torch.randn(min(1024, rows - start), width, device=device, dtype=torch.bfloat16) * 0.02

    args.out.mkdir(parents=True)
    config.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    if args.config_only:
        return
    specs = [Spec(name, shape, torch.bfloat16) for name, shape in shapes.items()]
    total = write(args.out, specs, draw, 5 * 10**9)
    print(f"wrote {args.shape} with {total / 2 / 1e9:.2f} G parameters to {args.out}")


if __name__ == "__main__":
    main()
