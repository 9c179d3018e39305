"""Tests that start several gloo processes, through `harness.run_ranks`."""
