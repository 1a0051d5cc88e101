"""The learner without Ray: a DeepSpeed rank (engine), its loss, and what the ranks share (batch)."""
