"""Files on disk: graphpeft's adapter format, PEFT's, and safetensors checkpoints."""
