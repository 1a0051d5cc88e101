"""Writes a report: `python -m g2rpo_ray.report`."""

if __name__ == "__main__":
    from g2rpo_ray.exits import start

    start("g2rpo_ray.commands.report")
