"""Using a trained model: loading, logits, generation."""
