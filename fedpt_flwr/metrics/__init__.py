"""Metrics as modules that ``evaluate.load(<path>)`` loads without a network."""
