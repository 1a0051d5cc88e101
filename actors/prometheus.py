"""Metrics as Ray metrics, which the cluster exports for Prometheus as `ray_g2rpo_<name>`."""

import re

from ray.util.metrics import Gauge

from g2rpo_ray.runs.tracking import Metrics, Sink


def prometheus_sink(run: str) -> Sink:
    """A sink that sets a gauge for every metric, tagged with the run's name; they show up to 10 s late."""
    gauges: dict[str, Gauge] = {}

    def sink(iteration: int, metrics: Metrics) -> None:
        for key, value in {"iteration": iteration, **metrics}.items():
            if key not in gauges:
                name = "g2rpo_" + re.sub(r"\W", "_", key)
                gauges[key] = Gauge(name, description=key, tag_keys=("run",))
                gauges[key].set_default_tags({"run": run})
            gauges[key].set(value)

    return sink
