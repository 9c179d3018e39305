"""Checkpoints of other frameworks and layouts, to and from the native one, verified by default."""
