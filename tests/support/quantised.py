"""Settings of completions in int8."""

INT8 = {"rollout__completions__quantization": "int8"}
