"""Comparison of adapters on the same noise: plan, saved scores, results."""
