"""The work of a rollout actor, without Ray: plan, noise, sampling, decoding; and the cost of a run."""
