"""Tries adapters in the browser: `python -m g2rpo_ray.demo`."""

if __name__ == "__main__":
    from g2rpo_ray.exits import start

    start("g2rpo_ray.commands.demo")
