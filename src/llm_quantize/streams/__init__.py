"""The network run block by block: transformers' own modules, weights from anywhere, hidden states on their way."""
