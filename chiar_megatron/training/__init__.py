"""Training: engine, optimizer, one step, the loop, validation."""
