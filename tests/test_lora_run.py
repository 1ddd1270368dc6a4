"""Whole federations of adapters: exact means, devices of lower rank, and what peft alone makes of what they leave."""

import json

import numpy as np
import pytest
import torch
from federation import federate, final_arrays
from peft import AutoPeftModelForCausalLM, PeftModel
from reference import products
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from fedpt_flwr.models import resolve_model
from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.runs import read_json

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

RANKS = {1: 2}
LORA = {"tuning.mode": "lora", "tuning.lora-rank": 4, "tuning.lora-alpha": 6.0, "train.learning-rate": 0.01}
ENDS = {"scoring.round-items": 0, "scoring.num-items": 2, "scoring.few-shot": 0, "scoring.rows": "tuned,proxy"}


def node_config(device):
    config = {"partition-id": device, "num-partitions": 2}
    return config | ({"lora-rank": RANKS[device]} if device in RANKS else {})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Exact, in 8 bits, one of two devices of rank 2; with a copy for the devices."""
    changes = {"tuning.lora-aggregation": "exact", "wire.dtype": "int8"}
    return federate(tmp_path_factory.mktemp("exact"), 2, LORA | ENDS | changes, node_config=node_config)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def plain():
    """The small model as transformers loads it, in float32: stored it is in bfloat16."""
    return AutoModelForCausalLM.from_pretrained(resolve_model("demo:small"), dtype=torch.float32)


IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@torch.inference_mode()
def logits(model):
    return model(input_ids=IDS).logits


def test_the_proxys_adapter_is_loaded_by_peft_alone_and_is_the_dense_matrix_of_the_arrays(run):
    base = plain()
    by_peft = PeftModel.from_pretrained(base, str(run / "proxy" / "tuned"))
    assert type(by_peft.base_model).__name__ == "LoraModel"
    by_hand = plain()
    weights = dict(by_hand.named_parameters())
    with torch.no_grad():
        for module, product in products(final_arrays(run)).items():
            name = module.removeprefix("base_model.model.").replace(".lora.default", "")
            weights[name] += torch.from_numpy(6.0 / 4 * product).float()
    torch.testing.assert_close(logits(by_peft), logits(by_hand), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(by_peft), logits(ProxyModel.from_pretrained(run).tuned), atol=1e-6, rtol=1e-6)
    with by_peft.disable_adapter():
        untuned = logits(by_peft)
    assert not torch.allclose(logits(by_peft), untuned)


def test_the_devices_copy_is_loaded_by_peft_alone_with_its_base(run):
    copy = AutoPeftModelForCausalLM.from_pretrained(str(run / "device"))
    assert read_json(run / "device" / "adapter_config.json")["r"] == 4
    saved = load_file(run / "device" / "adapter_model.safetensors")
    state = {name.replace(".default", ""): part for name, part in copy.state_dict().items() if "lora_" in name}
    assert state.keys() == saved.keys()
    for name, values in saved.items():
        np.testing.assert_array_equal(state[name].numpy(), values)
    assert torch.isfinite(logits(copy)).all()


def test_a_device_of_lower_rank_sends_less_and_the_ledger_says_why(run):
    rows = [row for row in lines(run / "costs.jsonl") if "bytes_up" in row]
    assert not any(row.get("refused") for row in rows)
    whole, half = ([row for row in rows if row["device"] == device] for device in (0, 1))
    assert {row["limits"]["lora-rank"] for row in half} == {2}
    assert max(row["bytes_down"] for row in half) < 0.75 * min(row["bytes_down"] for row in whole)
    assert max(row["bytes_up"] for row in half) < 0.85 * min(row["bytes_up"] for row in whole)
    assert [shard.get("lora_rank") for shard in read_json(run / "shards.json")] == [None, 2]


def test_what_the_rank_leaves_out_is_in_the_metrics(run):
    found = [row["lora_left_out"] for row in lines(run / "metrics.jsonl") if row["phase"] == "train"]
    assert len(found) == 2
    assert all(0 < value < 0.5 for value in found)


@pytest.mark.slow
def test_frozen_a_is_the_same_on_all_devices_and_half_the_bytes(tmp_path):
    settings = LORA | ENDS | {"tuning.lora-aggregation": "frozen-a", "distillation.mode": "carry"}
    settings |= {"strategy.name": "FedAdam", "strategy.arguments": "eta = 0.01"}
    frozen = federate(tmp_path, 2, settings, node_config=node_config)
    assert all(".lora_B." in name for name in final_arrays(frozen))
    rows = [row for row in lines(frozen / "costs.jsonl") if "bytes_up" in row]
    assert not any(row.get("refused") for row in rows)
    whole, of_b = (
        sum(values.nbytes for values in arrays.values())
        for arrays in (load_file(frozen / "proxy" / "tuned" / "adapter_model.safetensors"), final_arrays(frozen))
    )
    # B is 0.54 of these adapters; names and shapes are a fifth more in messages this small.
    crossed = [row[way] for row in rows if row["device"] == 0 for way in ("bytes_up", "bytes_down")]
    assert of_b < min(crossed) <= max(crossed) < 1.25 * of_b < 0.7 * whole
    base = plain()
    by_peft = PeftModel.from_pretrained(base, str(frozen / "proxy" / "tuned"))
    torch.testing.assert_close(logits(by_peft), logits(ProxyModel.from_pretrained(frozen).tuned))
