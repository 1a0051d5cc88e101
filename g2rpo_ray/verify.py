"""Replays an iteration of a run: `python -m g2rpo_ray.verify RUN`."""

if __name__ == "__main__":
    from g2rpo_ray.exits import start

    start("g2rpo_ray.commands.verify")
