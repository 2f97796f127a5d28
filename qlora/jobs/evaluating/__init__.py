"""What an evaluation measures on, and what it holds against it."""
