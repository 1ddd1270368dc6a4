"""``python -m fedpt_flwr.cli``."""

from fedpt_flwr.cli import main

if __name__ == "__main__":
    main()
