"""Processes: who this one is, how they are started, how they find each other, and what a CPU needs."""
