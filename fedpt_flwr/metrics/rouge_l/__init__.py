"""The metric ``rouge_l``."""
