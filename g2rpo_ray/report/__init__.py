"""One HTML file about a run, or several: results, pictures, curves, time, faults, settings. It needs no network."""
