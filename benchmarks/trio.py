"""A large and two small models whose agreement is set by a dial: what decoding is measured with, without any training.

How fast drafting is depends on the models only by what a step of each costs and by how often the drafter is right. Both
are built here. The models are random, with embeddings wide enough that their greedy texts do not fall into loops and
that each token depends on all before it, so that a fault in a cache shows at once:

- ``core``, a small random model, stands for what all three have in common;
- ``large`` computes the core's function at the cost of a large model: the residual stream is replicated, every matrix
  is tiled accordingly, and further layers of random weights add next to nothing;
- ``untuned`` is the core with noise on its weights, and ``tuned`` is ``untuned`` with some other noise.

The proxy scores ``large + tuned - untuned``, so its drafter ``tuned`` is off by ``untuned - core``: the noise of
``untuned`` is chosen such that drafter and proxy prefer the same token in the wanted share of cases.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from fedpt_flwr.runs import read_json, write_json

WORKLOADS: dict[str, float | None] = {"high": 0.89, "middle": 0.6, "never": None}
"""Share of tokens that the drafter is to get right; None makes one that is wrong all but always."""

TUNING_NOISE = 0.05
"""What separates ``tuned`` from ``untuned``, relative to the weights: about every fifth token of the proxy is not the
large model's."""

HEAD_SIZE = 64


@dataclass(frozen=True)
class Size:
    """Shapes of the three models."""

    hidden: int
    """Hidden size of the small models."""
    layers: int
    """Layers of the small models."""
    times: int
    """How many times as wide the large model is."""
    extra_layers: int
    """How many more layers it has."""
    vocab: int = 8192
    """Number of token ids."""


SIZES = {
    "tiny": Size(hidden=64, layers=2, times=3, extra_layers=2, vocab=512),
    "small": Size(hidden=256, layers=4, times=3, extra_layers=6),
    "full": Size(hidden=384, layers=6, times=3, extra_layers=8),
    "billion": Size(hidden=512, layers=8, times=4, extra_layers=16),
}


def llama(size: Size, times: int = 1, extra_layers: int = 0) -> PreTrainedModel:
    """A Llama-type model, so many times as wide as the small one and with so many more layers."""
    hidden = size.hidden * times
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size.vocab,
            hidden_size=hidden,
            intermediate_size=hidden * 11 // 4,
            num_hidden_layers=size.layers + extra_layers,
            num_attention_heads=hidden // HEAD_SIZE,
            num_key_value_heads=hidden // HEAD_SIZE,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def gpt2(size: Size, times: int = 1, extra_layers: int = 0) -> PreTrainedModel:
    """The same of GPT-2's type, with an output layer of its own."""
    hidden = size.hidden * times
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=size.vocab,
            n_embd=hidden,
            n_layer=size.layers + extra_layers,
            n_head=hidden // HEAD_SIZE,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def neox(size: Size, times: int = 1, extra_layers: int = 0) -> PreTrainedModel:
    """The same of GPT-NeoX's type."""
    hidden = size.hidden * times
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=size.vocab,
            hidden_size=hidden,
            intermediate_size=hidden * 4,
            num_hidden_layers=size.layers + extra_layers,
            num_attention_heads=hidden // HEAD_SIZE,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {"llama": llama, "gpt2": gpt2, "neox": neox}

# Names of the layers in the three families, by what becomes of them.
_INPUTS = ("embed_tokens", "embed_in", "wte", "wpe")
_OUTPUTS = ("lm_head", "embed_out")
_WRITERS = ("o_proj", "down_proj", "c_proj", "attention.dense", "dense_4h_to_h")


def randomise(model: PreTrainedModel, seed: int, *, writing: float = 0.7) -> PreTrainedModel:
    """Draw a model's matrices anew, in place.

    Args:
        model: The model.
        seed: Of the weights.
        writing: Scale of the matrices that write into the residual stream, beside embeddings of scale 1.

    Returns:
        The model.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            continue
        scale = 1.0
        if not _is(name, _INPUTS):
            num_inputs = weight.shape[0] if _is_transposed(model, name) else weight.shape[1]
            scale = (3.0 if _is(name, _OUTPUTS) else writing if _is(name, _WRITERS) else 1.4) / math.sqrt(num_inputs)
        weight.data.normal_(0, scale, generator=generator)
    return model.eval()


def widened(core: PreTrainedModel, large: PreTrainedModel, times: int, seed: int) -> PreTrainedModel:
    """Give a larger model the weights with which it scores as the core does.

    Args:
        core: The small model.
        large: One of its family, ``times`` as wide, with as many layers or more; its weights are replaced.
        times: How often the residual stream is replicated.
        seed: Of the further layers.

    Returns:
        The large model.
    """
    randomise(large, seed, writing=1e-3)
    weights = dict(core.named_parameters())
    for name, weight in large.named_parameters():
        if name not in weights:
            continue
        small = weights[name].data
        if _is(name, _INPUTS):
            wide = small.repeat(1, times)
        elif _is(name, _OUTPUTS):
            wide = small.repeat(1, times) / times
        else:
            fused = 3 if "c_attn" in name else 1  # GPT-2 has queries, keys and values one after the other
            repeats = [times] if small.dim() == 1 else [times, times]
            wide = torch.cat([part.repeat(repeats) for part in small.chunk(fused, -1)], -1)
            wide = wide if small.dim() == 1 else wide / times
        weight.data.copy_(wide)
    return large.eval()


def noise_of(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    """Noise for each matrix of a model, as large as its weights; the embeddings have none."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(weight.shape, generator=generator) * weight.data.std()
        for name, weight in model.named_parameters()
        if weight.dim() > 1 and not _is(name, _INPUTS)
    }


def noisy(model: PreTrainedModel, strength: float, noise: dict[str, Tensor]) -> PreTrainedModel:
    """A copy of a model with some of that noise added."""
    model = copy.deepcopy(model)
    for name, weight in model.named_parameters():
        if name in noise:
            weight.data.add_(noise[name], alpha=strength)
    return model


def noisy_pair(core: PreTrainedModel, strength: float) -> tuple[PreTrainedModel, PreTrainedModel]:
    """``untuned``, with so much noise relative to the core's weights, and ``tuned``."""
    untuned = noisy(core, strength, noise_of(core, seed=2))
    return untuned, noisy(untuned, TUNING_NOISE, noise_of(core, seed=3))


def dialled_pair(core: PreTrainedModel, wanted: float) -> tuple[PreTrainedModel, PreTrainedModel]:
    """``untuned`` and ``tuned``, such that ``tuned`` and ``core + tuned - untuned`` agree on that share of tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(core.config.vocab_size, (16, 48), generator=generator)
    with torch.inference_mode():
        scores = core(ids).logits
    low, high = 0.005, 0.5
    for _ in range(6):
        strength = math.sqrt(low * high)
        untuned, tuned = noisy_pair(core, strength)
        with torch.inference_mode():
            of_tuned = tuned(ids).logits
            right = of_tuned.argmax(-1) == (scores + of_tuned - untuned(ids).logits).argmax(-1)
        low, high = (strength, high) if right.float().mean() > wanted else (low, strength)
    return untuned, tuned


def shifted_pair(core: PreTrainedModel) -> tuple[PreTrainedModel, PreTrainedModel]:
    """``untuned`` and ``tuned`` that take each token for its neighbour, so that the drafter is wrong all but always."""
    pair = noisy_pair(core, 0.02)
    for model in pair:
        head = model.get_output_embeddings()
        head.weight.data = head.weight.data.roll(1, 0)
    return pair


def adapted(untuned: PreTrainedModel, rank: int = 8) -> PeftModel:
    """A small model under an adapter that changes its weights about as much as ``tuned`` differs from ``untuned``.

    Args:
        untuned: Gets the adapter; its own weights stay as they are.
        rank: Of the adapter's matrices.
    """
    is_turned = any(type(part).__name__ == "Conv1D" for part in untuned.modules())
    tuned = get_peft_model(untuned, LoraConfig(r=rank, target_modules="all-linear", fan_in_fan_out=is_turned))
    generator = torch.Generator().manual_seed(4)
    for layer in tuned.modules():
        if hasattr(layer, "lora_A"):
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            strength = TUNING_NOISE * layer.base_layer.weight.float().std() / layer.scaling["default"]
            for weight, scale in ((down, 1.0), (up, float(strength) / math.sqrt(rank))):
                weight.data.copy_(torch.randn(weight.shape, generator=generator) * scale)
    return tuned.eval()


def make(folder: Path, family: str, size: Size) -> dict[str, float]:
    """Write the large model and a pair of small ones per workload into a folder, unless they are there.

    Args:
        folder: ``large``, ``<workload>/untuned`` and ``<workload>/tuned`` are written there.
        family: One of :data:`FAMILIES`.
        size: Shapes of the models.

    Returns:
        Parameters of the large and the small models, in millions, and how many times as many weights the large one
        reads per token.
    """
    done, key = folder / "trio.json", {"family": family, "size": asdict(size), "workloads": WORKLOADS}
    if done.exists() and (made := read_json(done))["key"] == key:
        return dict(made["weights"])
    done.unlink(missing_ok=True)
    core = randomise(FAMILIES[family](size), seed=0)
    large = widened(core, FAMILIES[family](size, size.times, size.extra_layers), size.times, seed=1)
    weights = {
        "large_millions": num_parameters(large) / 1e6,
        "small_millions": num_parameters(core) / 1e6,
        "size_ratio": bytes_read(large) / bytes_read(core),
    }
    large.save_pretrained(folder / "large")
    del large
    for name, wanted in WORKLOADS.items():
        untuned, tuned = shifted_pair(core) if wanted is None else dialled_pair(core, wanted)
        untuned.save_pretrained(folder / name / "untuned")
        tuned.save_pretrained(folder / name / "tuned")
    write_json(done, {"key": key, "weights": weights})
    return weights


def load(folder: Path, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """One of the models that :func:`make` wrote."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.to(device).eval()


def num_parameters(model: PreTrainedModel) -> int:
    """Of all weights."""
    return sum(weight.numel() for weight in model.parameters())


def bytes_read(model: PreTrainedModel) -> int:
    """Bytes of weights that scoring one token reads: all but the tables in which ids and positions are looked up."""
    return sum(weight.nbytes for name, weight in model.named_parameters() if not _is(name, _INPUTS))


def agreement(tuned: PreTrainedModel, prompts: Tensor, new: Tensor) -> Tensor:
    """Where a drafter that was given all tokens before would have drafted the right one.

    Args:
        tuned: The drafter.
        prompts: ``(rows, seq)``, without padding.
        new: The proxy's greedy tokens, ``(rows, num_new)``.

    Returns:
        ``(rows, num_new)``, bool.
    """
    logits = tuned(torch.cat([prompts, new], 1)).logits
    return logits[:, prompts.shape[1] - 1 : -1].argmax(-1) == new


def drafting(right: Tensor, num_drafted: int) -> tuple[float, float]:
    """What a fixed draft length comes to, from where the drafter is right: exact, since drafting changes no token.

    Args:
        right: What :func:`agreement` returned.
        num_drafted: Tokens drafted per round, at most.

    Returns:
        Accepted over drafted tokens, and new tokens per round of one row.
    """
    drafted = accepted = rounds = 0
    for row in right.tolist():
        place = 0
        while place < len(row):
            draft = row[place : min(place + num_drafted, len(row) - 1)]
            good = draft.index(False) if False in draft else len(draft)
            drafted, accepted, rounds = drafted + len(draft), accepted + good, rounds + 1
            place += good + 1
    return accepted / max(drafted, 1), right.numel() / rounds


def _is(name: str, kinds: Sequence[str]) -> bool:
    return any(f"{kind}." in name for kind in kinds)


def _is_transposed(model: PreTrainedModel, name: str) -> bool:
    return type(model.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D"
