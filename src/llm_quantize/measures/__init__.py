"""Mathematics of quality: divergence, perplexity, grades. Knows no runtime."""
