"""A world that tells methods apart: a tiny FLUX pipeline of scenes, its preference model, its rules. See README.md."""
