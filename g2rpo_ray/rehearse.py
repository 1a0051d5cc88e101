"""Rehearses a configuration: `python -m g2rpo_ray.rehearse`."""

if __name__ == "__main__":
    from g2rpo_ray.exits import start

    start("g2rpo_ray.commands.rehearse")
