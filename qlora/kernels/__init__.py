"""What makes training faster without changing what is computed; each with a test of that."""
