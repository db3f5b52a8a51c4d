"""Scripts that another interpreter runs, one model for each process: they import nothing of llm_quantize."""
