"""What a report says of a run, in numbers and in words."""
