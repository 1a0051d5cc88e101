"""The mathematics of sampling trees (G²RPO, arXiv 2510.01982, and its field), usable without the rest.

Its modules are imported by name: `tree`, `completion` and `win_rate` need numpy alone, the others torch, which takes
seconds to load.
"""
