"""What verbs share: a recipe and all that it names, opened."""
