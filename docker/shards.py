"""Deal the demo world's training data out to devices, each its file in a volume of its own.

A stand-in for what is there by nature: in a real federation every device has its data before anybody asks for it.
"""

import json
import sys
from pathlib import Path

from fedpt_flwr.data import read_records
from fedpt_flwr.partition import partition

DATA = Path("/data")

num_devices = int(sys.argv[1])
records = read_records("demo:train")
shards = partition("natural", [record["kind"] for record in records], num_devices, dirichlet_alpha=0.5, seed=0)
for number, shard in enumerate(shards, start=1):
    path = DATA / str(number) / "train.jsonl"
    temporary = path.with_suffix(".new")
    temporary.write_text("".join(f"{json.dumps(records[index], ensure_ascii=False)}\n" for index in shard))
    temporary.replace(path)
    kinds = ", ".join(sorted({records[index]["kind"] for index in shard}))
    sys.stdout.write(f"device {number}: {len(shard)} examples ({kinds})\n")
