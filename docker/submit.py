"""Talk to the SuperLink for an operator who is not there: register the devices, run the federation, see it through.

    submit.py register      tell the SuperLink the nodes' public keys
    submit.py run           see a run through to its end: the one that is under way, or a new one
    submit.py run --new     the same, with a new run even where the last one completed

The exit status of ``run`` is the run's own: 0 if it completed. Stopping this program does not stop the run, and started
again it goes on watching. A run whose ServerApp was killed is started again where its last complete round left off.

Environment: ``SUPERLINK`` (its address), ``NODES`` (how many devices there are), ``RUN_CONFIG`` (as for ``flwr run
-c``), ``FEDPT_HOME`` (where runs are written, read only here).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

APP = Path(__file__).parents[1]
TRUST = Path("/trust")
SILENCE_S = 600
"""How long the SuperLink may be away."""
NODES_S = 120
"""How long devices may take to come online; the run itself then waits for as many as it needs."""
RESUMES = 5
"""How often a run that was killed is started again."""


def main() -> None:
    """Do what the command line says."""
    home = Path(os.environ.setdefault("FLWR_HOME", str(Path.home() / ".flwr")))
    home.mkdir(parents=True, exist_ok=True)
    (home / "config.toml").write_text(
        '[superlink]\ndefault = "prod"\n\n[superlink.prod]\n'
        f'address = "{os.environ["SUPERLINK"]}"\nroot-certificates = "{TRUST}/ca.crt"\n'
    )
    match sys.argv[1:]:
        case ["register"]:
            register()
        case ["run", *options] if set(options) <= {"--new"}:
            run(new=bool(options))
        case _:
            end(__doc__ or "")


def register() -> None:
    """Register every node's key that the SuperLink does not know yet."""
    for number in range(1, int(os.environ["NODES"]) + 1):
        key = TRUST / f"node-{number}.pub"
        result = flwr("supernode", "register", str(key), "prod", "--name", f"node-{number}")
        said = result.stdout + result.stderr
        if result.returncode and "already in use" not in said:
            end(f"{key} could not be registered:\n{said}")
        say(f"node-{number} is {'known already' if result.returncode else 'registered'}")


def run(*, new: bool) -> None:
    """See a run through."""
    runs = answer("list", "prod")["runs"]
    going = [entry for entry in runs if not has_ended(entry)]
    last = max(runs, key=lambda entry: str(entry["pending-at"]), default=None)
    if going:
        entry = follow(str(going[0]["run-id"]))
    elif last is not None and not new and last["status"] == "finished:completed":
        say(f"Run {last['run-id']} has completed; `run --new` starts another")
        return
    elif last is not None and not new and was_killed(last):
        entry = last
    else:
        entry = follow(start())
    for _ in range(RESUMES):
        if not was_killed(entry):
            break
        folder = folder_of(str(entry["run-id"]))
        next_step = f"resuming {folder}" if folder else "starting it again"
        say(f"Run {entry['run-id']} was cut off ({entry['status-details']}); {next_step}")
        entry = follow(start(resume=folder))
    if entry["status"] != "finished:completed":
        end(f"Run {entry['run-id']}: {entry['status']}, {entry['status-details']}")
    say(f"Run {entry['run-id']}: {entry['status']}")


def start(resume: str = "") -> str:
    """Submit the app; the Flower run's id."""
    wanted, deadline = int(os.environ["NODES"]), time.monotonic() + NODES_S
    while (online := num_online()) < wanted and time.monotonic() < deadline:
        time.sleep(2)
    say(f"{online} of {wanted} devices are online")
    # Flower refuses a key that is there twice; here the later one holds, so that what is set outside wins.
    given = f"{os.environ['RUN_CONFIG']} resume='{resume}'"
    pairs = dict(re.findall(r"(\S+?)=('[^']*'|\"[^\"]*\"|\S+)", given))
    config = " ".join(f"{key}={value}" for key, value in pairs.items())
    known = run_ids()
    for _ in range(3):
        result = flwr("run", str(APP), "prod", "-c", config, "--format", "json")
        # Where the answer was lost the run may have begun all the same: it must not be submitted twice.
        if begun := run_ids() - known:
            break
    else:
        end(f"The run could not be started:\n{result.stdout}{result.stderr}")
    run_id = begun.pop()
    say(f"Started run {run_id}")
    return run_id


def follow(run_id: str) -> dict[str, Any]:
    """Print a run's log until it has ended, however often the connection breaks; the run's entry."""
    num_shown = 0
    while True:
        # From its beginning each time: what was shown is passed over.
        with subprocess.Popen(["flwr", "log", run_id, "prod", "--stream"], stdout=subprocess.PIPE, text=True) as log:
            for number, line in enumerate(log.stdout or ()):
                if number >= num_shown:
                    sys.stdout.write(line)
                    sys.stdout.flush()
                    num_shown += 1
        entry: dict[str, Any] = answer("list", "prod", "--run-id", run_id)["runs"][0]
        if has_ended(entry):
            return entry
        time.sleep(2)


def run_ids() -> set[str]:
    """All runs that the SuperLink knows."""
    return {str(entry["run-id"]) for entry in answer("list", "prod")["runs"]}


def has_ended(entry: dict[str, Any]) -> bool:
    """Whether a run is over."""
    return str(entry["status"]).startswith("finished")


def was_killed(entry: dict[str, Any]) -> bool:
    """Whether a run's ServerApp was ended from outside, rather than by an error of its own."""
    return entry["status"] == "finished:failed" and "exception" not in str(entry["status-details"]).lower()


def folder_of(run_id: str) -> str:
    """Name of the run folder that a Flower run wrote complete rounds into; empty if there is none."""
    for path in Path(os.environ["FEDPT_HOME"]).glob("runs/[0-9]*/config.json"):  # not the link `latest`
        ids = json.loads(path.read_text()).get("flower_run_ids", [])
        if run_id in map(str, ids) and any((path.parent / "rounds").glob("[0-9]*/round.json")):
            return path.parent.name
    return ""


def num_online() -> int:
    """How many devices the SuperLink can reach."""
    return sum(node["status"] == "online" for node in answer("supernode", "list", "prod")["nodes"])


def answer(*arguments: str) -> dict[str, Any]:
    """What ``flwr`` says as JSON; a SuperLink that is away is waited for."""
    deadline = time.monotonic() + SILENCE_S
    while True:
        result = flwr(*arguments, "--format", "json")
        try:
            said: dict[str, Any] = json.loads(result.stdout[result.stdout.index("{") :])
        except ValueError:
            said = {}
        if result.returncode == 0 and said.get("success", True) and said:
            return said
        if time.monotonic() > deadline:
            end(f"flwr {shlex.join(arguments)} failed:\n{result.stdout}{result.stderr}")
        time.sleep(3)


def flwr(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Call Flower's command line."""
    return subprocess.run(["flwr", *arguments], capture_output=True, text=True, check=False)


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"submit: {line}\n")
    sys.stdout.flush()


def end(reason: str) -> NoReturn:
    """Exit with a reason."""
    sys.exit(f"submit: {reason}")


if __name__ == "__main__":
    main()
