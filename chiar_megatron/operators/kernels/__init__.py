"""Triton kernels of the token operators. Nothing imports them, or triton, before a GPU path needs them."""
