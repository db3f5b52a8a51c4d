"""Models of the Hugging Face hub: found, fetched, their headers alone."""
