"""What a verb opens: a recipe and all that it names, a run, a checkpoint, an adapter."""
