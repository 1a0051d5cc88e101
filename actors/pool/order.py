"""Rules of a pool of rollout actors that the simulation of a run shares. No Ray."""

MIN_UNUSED_PER_ACTOR = 2  # unused results allowed for each actor; fewer would keep some actors idle
PREFETCH_S = 0.1  # results of this time are prefetched by one call; one call each would load the driver


def urgency(iteration: int, cost: float, trunk: bool) -> tuple[float, ...]:
    """The priority of a unit; the smallest is first: oldest iteration, then trunks, then the most expensive unit.

    Branches wait for trunks. `cost`: evaluations.
    """
    return (iteration, 0) if trunk else (iteration, 1, -cost)


def most_unused(limit: int, actors: int) -> int:
    """Largest number of calls that are running, or whose results are not used yet; see `max_unscored_units`."""
    return max(limit, MIN_UNUSED_PER_ACTOR * actors)
