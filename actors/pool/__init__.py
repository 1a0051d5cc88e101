"""A pool dispatches calls to actors of a kind. Its supervisor keeps their number; time limits find those that hang."""
