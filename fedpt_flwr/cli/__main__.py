"""``python -m fedpt_flwr.cli``."""

from fedpt_flwr.cli import main

main()
