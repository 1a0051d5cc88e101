"""Measures the parts of a run on this machine: `python -m g2rpo_ray.bench`."""

if __name__ == "__main__":
    from g2rpo_ray.exits import start

    start("g2rpo_ray.commands.bench")
