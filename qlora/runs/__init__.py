"""The run folder: what is in it, its checkpoints, its records, and who else is told of them."""
