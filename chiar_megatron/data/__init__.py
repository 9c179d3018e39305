"""From text to batches: tokenizer, preprocessing, streams of samples, micro-batches."""
