"""The learner: its DeepSpeed ranks (engine), what they share (batch), the Ray actors they live in (group)."""
