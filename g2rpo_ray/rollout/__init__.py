"""What a rollout worker does with a unit of work, without Ray: sample, decode, and the noise and plan it follows."""
