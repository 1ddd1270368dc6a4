"""A run's proxy over HTTP, as OpenAI's clients speak it."""
