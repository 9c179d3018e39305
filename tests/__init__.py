"""Tests: unit (one process), parallel (several gloo processes), slurm, gpu."""
