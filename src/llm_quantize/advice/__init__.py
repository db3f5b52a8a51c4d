"""What to take: the machine, what fits, what is known to be lost."""
