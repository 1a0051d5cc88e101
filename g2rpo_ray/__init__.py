"""G²RPO (Granular-GRPO, arXiv 2510.01982) for text-to-image flow models, as an actor/learner system on Ray."""

__version__ = "0.1.0"
