"""What knows nothing of models: errors, storage, memory, signals, limits, secrets, the hub."""
