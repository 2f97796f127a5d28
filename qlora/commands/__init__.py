"""The verbs, one file each: wiring and printing, no arithmetic. Only they see a whole Recipe."""
