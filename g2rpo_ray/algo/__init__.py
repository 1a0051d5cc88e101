"""The mathematics of sampling trees (G²RPO, arXiv 2510.01982, and its field), usable without the rest.

Import its modules by name: `tree`, `completion` and `win_rate` need only numpy, the others torch, which takes
seconds to import.
"""
