"""From the metadata of a GGUF file to the small files of a Hugging Face directory."""
