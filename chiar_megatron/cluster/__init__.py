"""SLURM: site settings, preflight, submission, attempts of a run."""
