"""From tokenizer files to the vocabulary that llama.cpp reads."""
