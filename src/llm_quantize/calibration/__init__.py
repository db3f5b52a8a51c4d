"""Text through the model once: what the inputs of every linear layer look like, kept for any later quantization."""
