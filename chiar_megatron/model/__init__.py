"""The CHIAR-Former on megatron-core, and what it costs."""
