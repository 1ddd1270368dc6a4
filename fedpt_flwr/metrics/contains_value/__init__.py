"""The metric ``contains_value``."""
