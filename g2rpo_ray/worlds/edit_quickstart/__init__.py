"""An embedded model that edits: pictures, instructions, rules and a tiny FLUX.2 klein pipeline; see README.md."""
