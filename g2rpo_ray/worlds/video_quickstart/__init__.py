"""An embedded video model: moving shapes, prompts, rules and a tiny Wan pipeline; see README.md."""
