"""What leaves a run: merged models, GGUF, int8, adapters, uploads, and their proofs."""
