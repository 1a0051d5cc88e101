"""Writes and reads run directories: checkpoints, metrics, pictures, held-out scores, timelines."""
