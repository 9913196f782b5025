"""What a model finds again in a long context: needles in held-out text, asked for at its end."""
