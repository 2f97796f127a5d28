"""Scores of answers and losses, and the answers themselves."""
