"""Scaling laws: plan a sweep, run it, collect its runs, fit laws with their uncertainty, predict."""
