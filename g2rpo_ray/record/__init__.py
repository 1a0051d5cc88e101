"""What a run leaves: its folder, checkpoints, metrics, pictures, timelines and held-out scores."""
