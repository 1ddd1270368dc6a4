"""Data of the demo world and nothing else: texts, tokenizer and checkpoints, found by ``importlib.resources``."""
