"""``python -m llm_quantize``."""

from llm_quantize.cli import main

main()
