"""Statistics, tables, plots and picture grids: one kit for everything that compares."""
