"""``fedpt``: what one does with runs once they are there, and before one starts.

Each command is a function here; heavy imports are inside the functions, so that ``fedpt --help`` answers at once.
"""

from __future__ import annotations

import sys

import typer

from fedpt_flwr.cli.ahead import check_config, plan
from fedpt_flwr.cli.answering import generate
from fedpt_flwr.cli.console import note
from fedpt_flwr.cli.experiments import attack, compare
from fedpt_flwr.cli.keys import certs
from fedpt_flwr.cli.making import demo_world, pretrain, split
from fedpt_flwr.cli.outcome import report, score
from fedpt_flwr.cli.serving import serve
from fedpt_flwr.errors import FedPTError

app = typer.Typer(
    name="fedpt",
    help="Federated proxy-tuning: devices tune a small LM, and it steers a frozen large one.\n\n"
    'Make a run with `flwr run . --stream --federation-config "num-supernodes=8 client-resources-num-cpus=1"`, '
    "then look at it with the commands below.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
for _command in (
    generate,
    score,
    serve,
    report,
    check_config,
    compare,
    attack,
    plan,
    demo_world,
    split,
    pretrain,
    certs,
):
    app.command()(_command)


def main() -> None:
    """Entry point of the console script: an error that a user can mend is one sentence, and exit status 1."""
    try:
        app()
    except FedPTError as error:
        note(f"fedpt: {error}", style="red")
        sys.exit(1)
    except BrokenPipeError:
        sys.exit(1)
