"""The commands, one in each module: options, checks and output."""
