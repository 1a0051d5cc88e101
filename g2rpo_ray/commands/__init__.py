"""The commands, one a file: options, checks, and what a user is told."""
