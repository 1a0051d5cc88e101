"""The learner without Ray: a DeepSpeed rank (engine), its losses, and the batch of all ranks."""
