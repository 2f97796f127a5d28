"""The verbs, one file each: they wire, and say what came of it."""
