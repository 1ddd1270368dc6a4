"""The server: config, models, strategy, checkpoints, scores. Everything that it composes is in ``fedpt_flwr``.

The large model is loaded here and only read. Every round ends in a checkpoint that can be served and gone on with; the
run ends in a table. A run that fails says why, last of all with the line ``FEDPT-RUN-FAILED``, and raises, so that
Flower calls it failed.
"""

from __future__ import annotations

import time
from logging import ERROR, INFO
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy
from transformers.utils import logging as transformers_logging

from fedpt_flwr.config import RunConfig, parse_run_config
from fedpt_flwr.distiller import IN_ROUNDS
from fedpt_flwr.errors import FedPTError
from fedpt_flwr.inner import make_inner_strategy
from fedpt_flwr.memory import give_freed_memory_back, keeping_freed_memory
from fedpt_flwr.records import code_hash
from fedpt_flwr.runs import RunFolder, find_run_to_resume, runs_root
from fedpt_flwr.secure_sum.session import Rules
from fedpt_flwr.server import Server, make_private
from fedpt_flwr.strategy import FedPT, RoundOutcome

FAILED = "FEDPT-RUN-FAILED"
CODE_HASH = code_hash(Path(__file__).with_name("client_app.py"))  # of the code that runs, whatever is edited later

app = ServerApp()
transformers_logging.disable_progress_bar()  # a log is no place for it


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run config describes."""
    started = time.perf_counter()
    give_freed_memory_back()
    try:
        config = parse_run_config(context.run_config)
        root = runs_root(config.output_dir)
        if config.resume:
            run = RunFolder.open(find_run_to_resume(config.resume, root=root))
            log(INFO, "Resuming the run %s", run.path.name)
        else:
            run = RunFolder.create(root, context.run_id)
        with run:
            log(INFO, "Run folder: %s", run.path)
            federate(grid, config, run, started, flower_run_id=context.run_id)
    except FedPTError as error:
        for line in str(error).splitlines():
            log(ERROR, "%s", line)
        log(ERROR, "%s: %s", FAILED, _headline(error))
        raise
    except Exception as error:
        message = str(error).strip() or "no message"
        log(ERROR, "%s: %s: %s", FAILED, type(error).__name__, message.splitlines()[0])
        raise


def _headline(error: FedPTError) -> str:
    """The rule that was broken and what was found, in one line; of several the first."""
    lines = [str(error), *(str(problem) for problem in error.problems[:1])]
    return " | first: ".join(line.splitlines()[0] for line in lines)


def federate(grid: Grid, config: RunConfig, run: RunFolder, started: float, *, flower_run_id: int = 0) -> None:
    """Load, tune, score: everything between the first line of the log and the table at its end."""
    inner = make_inner_strategy(config.strategy)
    private = make_private(inner, config, run)
    server = Server.load(config, run, flower_run_id, code_hash=CODE_HASH)
    server.private = private
    try:
        _federate(grid, config, server, inner, started, flower_run_id)
    finally:
        server.settle()


def _federate(
    grid: Grid, config: RunConfig, server: Server, inner: Strategy, started: float, flower_run_id: int
) -> None:
    arrays, last_round = server.first_arrays(), 0
    if config.resume:
        arrays, last_round = server.resume(inner, arrays)
        if server.has_results(last_round):
            log(INFO, "This run has ended after round %d and has its results: it is left as it is", last_round)
            server.leave()
            return

    def after_aggregate(outcome: RoundOutcome) -> ArrayRecord | None:
        arrays.clear()  # what the first round began with: nobody needs it any more, and its memory is given back
        server.write_shards(list(strategy.roster.devices.values()))
        with keeping_freed_memory():
            return server.after_aggregate(outcome)

    strategy = FedPT(
        server.private or inner,
        after_aggregate,
        seed=config.seed,
        fraction_train=config.fraction_train,
        min_devices=config.min_devices,
        min_replies=config.min_replies,
        max_failed_rounds=config.max_failed_rounds,
        wait_timeout_s=config.wait_timeout_s,
        code_hash=CODE_HASH,
        wire_dtype=config.wire.dtype,
        max_update_norm=config.strategy.max_update_norm,
        refuse_above_norm=config.strategy.above_norm == "refuse",
        expected=server.devices_before() if config.resume else None,
        on_devices=None if config.resume else server.write_shards,
        is_good_enough=server.is_good_enough,
        secure_sum=Rules.of(config) if config.privacy.secure_sum else None,
        lora_rank=config.tuning.lora_rank if config.tuning.mode == "lora" else 0,
        lora_aggregation=config.tuning.lora_aggregation,
        taken=server.taken_before(last_round),
    )
    if config.resume:
        if not server.is_over(last_round):
            strategy.meet_devices(grid)  # nothing of the run may be lost for devices that cannot go on with it
        server.go_on(last_round, flower_run_id)
        log(INFO, "Going on after round %d of %d", last_round, config.num_server_rounds)
    server.rest()
    result = strategy.start(
        grid,
        initial_arrays=arrays,
        num_rounds=config.num_server_rounds,
        timeout=config.round_timeout_s,
        train_config=ConfigRecord(server.told_to_devices()),
        first_round=last_round + 1,
    )
    if config.distillation.mode not in IN_ROUNDS:
        server.wake(result.arrays)
    with keeping_freed_memory():
        server.finish(started=started)
