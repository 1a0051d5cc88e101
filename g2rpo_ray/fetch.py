"""Fetches models from the hub: `python -m g2rpo_ray.fetch`."""

if __name__ == "__main__":
    from g2rpo_ray.exits import start

    start("g2rpo_ray.commands.fetch")
