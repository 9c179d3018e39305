"""What a recipe costs before it runs: read from the ledger, or simulated from a run's traces."""
