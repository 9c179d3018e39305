"""Recipes: schema, loading, checks, presets, and the translation to megatron-core's configs."""
