"""One HTML file about a run, or several: results, pictures, curves, time, faults, settings. It needs no network."""

from g2rpo_ray.report.page import render
from g2rpo_ray.report.read import Run, read_run

__all__ = ["Run", "read_run", "render"]
