"""What an evaluation is made of: the adapters, the scores kept so far, statistics and tables."""
