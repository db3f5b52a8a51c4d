"""What a comparison found, as data (``result``) and as documents: the HTML page, Markdown for a model card, JSON."""
