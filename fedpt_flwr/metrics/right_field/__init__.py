"""The metric ``right_field``."""
