"""Comparison of methods at equal cost: variants × seeds, a record of runs, and tables and figures made from it."""
