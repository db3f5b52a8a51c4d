"""llama.cpp's format: metadata, levels and mixes, vocabulary."""
