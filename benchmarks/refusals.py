"""Models and tokenizers that cannot be used, and what one is told: a table whose every line is provoked.

python benchmarks/refusals.py          the table as docs/models.md has it
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from transformers import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.families import Checkpoints
from fedpt_flwr.config import TuningConfig
from fedpt_flwr.errors import FedPTError
from fedpt_flwr.models import (
    check_context,
    load_causal_lm,
    load_tokenizer,
    make_tunable,
    model_without_weights,
)
from fedpt_flwr.placement import Placement
from fedpt_flwr.vocabulary import match_vocabularies


def wrong_inputs(checkpoints: Checkpoints, work: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is wrong, and what meets it."""
    small, large = checkpoints.pair("llama-2")
    gpt2, _ = checkpoints.pair("gpt-2")

    def changed(name: str, change: Callable[[Path], object]) -> str:
        folder = work / name
        shutil.copytree(large, folder)
        change(folder)
        return str(folder)

    def first_shard(folder: Path) -> Path:
        return min(folder.glob("model-*.safetensors"))

    def edited(file: str, **entries: object) -> Callable[[Path], object]:
        def edit(folder: Path) -> None:
            content = json.loads((folder / file).read_text(encoding="utf-8"))
            (folder / file).write_text(json.dumps(content | entries), encoding="utf-8")

        return edit

    def written(file: str, content: str) -> Callable[[Path], object]:
        return lambda folder: (folder / file).write_text(content, encoding="utf-8")

    def cut(folder: Path) -> None:
        shard = first_shard(folder)
        shard.write_bytes(shard.read_bytes()[:2000])

    def only_bin(folder: Path) -> None:
        for file in folder.glob("model*"):
            file.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"pickled")

    def other_merges(folder: Path) -> None:
        file = folder / "tokenizer.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        content["model"]["merges"][:2] = reversed(content["model"]["merges"][:2])
        vocabulary = content["model"]["vocab"]
        last, before = list(vocabulary)[-1], list(vocabulary)[-2]
        vocabulary[last], vocabulary[before] = vocabulary[before], vocabulary[last]
        file.write_text(json.dumps(content), encoding="utf-8")

    def loading(name: str, change: Callable[[Path], object]) -> Callable[[], object]:
        return lambda: load_causal_lm(changed(name, change))

    def reading(name: str, change: Callable[[Path], object]) -> Callable[[], object]:
        return lambda: load_tokenizer(changed(name, change))

    def placed(**settings: str) -> Callable[[], object]:
        return lambda: load_causal_lm(str(large), placement=Placement(**settings))

    yield "a folder that is not there", lambda: load_causal_lm("/models/none")
    yield "a folder without `config.json`", loading("bare", lambda folder: (folder / "config.json").unlink())
    yield "weights as `.bin` alone", loading("bin", only_bin)
    yield "a shard that is missing", loading("missing", lambda folder: first_shard(folder).unlink())
    yield "a shard that is cut off", loading("cut", cut)
    yield (
        "a kind of model that nobody knows",
        loading("unknown", edited("config.json", model_type="zeta")),
    )
    yield "a `config.json` that is no object", loading("list", written("config.json", "[]"))
    yield "a size that no model can have", loading("negative", edited("config.json", hidden_size=-1))
    yield "a size that is no number", loading("many", edited("config.json", vocab_size="many"))
    yield "no attention heads", loading("headless", edited("config.json", num_attention_heads=0))
    yield "a `tokenizer.json` that is something else", reading("something", edited("tokenizer.json", model={}))
    yield "a `tokenizer_config.json` that is no object", reading("listed", written("tokenizer_config.json", "[]"))
    yield "a model that is no causal LM", loading("encoder", edited("config.json", model_type="t5"))
    yield (
        "a tokenizer without an end-of-text token",
        reading("endless", edited("tokenizer_config.json", eos_token=None)),
    )
    yield (
        "models of two families",
        lambda: match_vocabularies(load_tokenizer(str(large)), load_tokenizer(str(gpt2))),
    )
    yield (
        "the same tokens merged in another order",
        lambda: match_vocabularies(load_tokenizer(changed("merges", other_merges)), load_tokenizer(str(small))),
    )
    yield (
        "a tokenizer with more tokens than the model scores",
        lambda: match_vocabularies(
            load_tokenizer(str(small)),
            load_tokenizer(str(small)),
            {"large": len(load_tokenizer(str(small))) - 9},
        ),
    )
    yield (
        "LoRA targets of another family",
        lambda: make_tunable(
            load_causal_lm(str(gpt2)), TuningConfig(mode="lora", lora_targets="q_proj,v_proj"), seed=0
        ),
    )
    yield "texts longer than the context", lambda: check_context(model_without_weights(str(small)).config, 4096)
    yield "a device map with a module that is not there", placed(device_map='{"": "cpu", "transformer.h": "disk"}')
    yield "a device map that leaves weights out", placed(device_map='{"model.layers": "cpu"}')
    yield "a GPU that is not there", placed(device_map='{"": 99}')
    yield "a bound on memory without an automatic map", placed(max_memory='{"cpu": "8GiB"}')
    yield "a quantisation without its package", placed(quantization='{"quant_method": "hqq"}')
    yield "a quantisation of no known kind", placed(quantization='{"bits": 4}')


def told(work: Path) -> dict[str, str]:
    """What each wrong input is met with, by what is wrong; paths below ``work`` are shortened.

    Raises:
        RuntimeError: A wrong input was not refused.
    """
    found = {}
    for wrong, meet in wrong_inputs(Checkpoints(work / "checkpoints"), work):
        try:
            meet()
        except FedPTError as error:
            found[wrong] = str(error).replace(str(work / "checkpoints"), "/models").replace(str(work), "/models")
        else:
            raise RuntimeError(f"was not refused: {wrong}")
    return found


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    print("| wrong | what one is told |\n| --- | --- |")
    with tempfile.TemporaryDirectory() as work:
        for wrong, sentence in told(Path(work)).items():
            print(f"| {wrong} | " + sentence.replace("|", "\\|") + " |")


if __name__ == "__main__":
    main()
