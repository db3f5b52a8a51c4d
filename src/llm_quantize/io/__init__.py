"""Containers and files: safetensors, GGUF, resumable output. These modules know bytes, not meaning."""
