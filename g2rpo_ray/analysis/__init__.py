"""Statistics, tables, plots and picture grids for all comparisons."""
