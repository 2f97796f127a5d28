"""Conversations with a model, and votes on its answers."""
