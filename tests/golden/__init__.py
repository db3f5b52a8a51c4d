"""Golden files: what today's program writes and prints, byte for byte. harness.py says what is compared, and how."""
