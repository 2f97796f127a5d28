"""Several trainings: what differs, and what came of each."""
