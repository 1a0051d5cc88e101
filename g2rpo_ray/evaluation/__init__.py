"""Adapters compared on the same noise: what is compared, the scores kept so far, the results."""
