"""The program that builds the embedded pipelines and their preference models, each from a world of drawn pictures."""
