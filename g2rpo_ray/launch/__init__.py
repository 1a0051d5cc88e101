"""What happens before and around a run: the command line, checks of the configuration, the plan in words."""
