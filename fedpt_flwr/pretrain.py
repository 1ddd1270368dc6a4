"""Pre-trains a causal LM on a stream of token ids: one plain loop, the same on CPU and GPU.

The loop knows nothing about where the tokens come from. It is meant for the tiny models of the demo world and for pairs
of small models on a text of one's own, not for anything that needs more than one device.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from fedpt_flwr.errors import ConfigError, DataError, RunError
from fedpt_flwr.runs import write_file

ProgressCallback = Callable[[int, float], None]
"""Called after each step with the number of steps done and the loss of that step in nats per token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaShape:
    """The size of a Llama-type model with tied embeddings and a SwiGLU of 8/3 of the width (Touvron et al. 2023)."""

    hidden_size: int
    """Width of the residual stream."""

    num_layers: int
    """Transformer blocks."""

    num_heads: int
    """Attention heads; the width must be a multiple of it, with an even width per head."""

    max_positions: int = 512
    """Longest sequence in tokens that the config of the model promises."""

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.num_heads) != 0:
            raise ConfigError(
                "the width of a model must be an even multiple of its number of heads",
                value=(self.hidden_size, self.num_heads),
                remedy="change one of the two",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainConfig:
    """One pre-training: AdamW, linear warm-up, cosine decay, windows drawn at random from the token stream."""

    steps: int
    """Optimizer steps."""

    batch_size: int = 16
    """Windows per step."""

    window: int = 128
    """Predicted tokens per window."""

    learning_rate: float = 2e-3
    """Peak learning rate."""

    final_learning_rate_fraction: float = 0.02
    """Learning rate of the last step as a fraction of the peak."""

    warmup_steps: int = 50
    """Steps in which the learning rate rises linearly from almost zero."""

    weight_decay: float = 0.05
    """AdamW's decoupled weight decay."""

    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's decay rates of the two moments."""

    clip_norm: float = 1.0
    """Largest norm of the gradient of all parameters together."""

    seed: int = 0
    """Seed of the windows that are drawn."""

    @property
    def tokens_seen(self) -> int:
        """Predicted tokens over the whole training, repetitions included."""
        return self.steps * self.batch_size * self.window

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "window"):
            if getattr(self, name) < 1:
                raise ConfigError("must be at least 1", value=getattr(self, name), place=name)
        if self.learning_rate <= 0:
            raise ConfigError("must be positive", value=self.learning_rate, place="learning_rate")


def make_llama(
    shape: LlamaShape,
    *,
    vocab_size: int,
    bos_token_id: int,
    eos_token_id: int,
    pad_token_id: int,
    seed: int,
) -> LlamaForCausalLM:
    """An untrained Llama-type model in float32 on the CPU; the global random state is left as it was."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.hidden_size * 8 // 3 // 16 * 16,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=True,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecipe:
    """How one model is made."""

    shape: LlamaShape
    training: PretrainConfig


def make_model(
    recipe: ModelRecipe,
    tokenizer: PreTrainedTokenizerFast,
    tokens: Tensor,
    *,
    device: str = "cpu",
    progress: ProgressCallback | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int = 100,
) -> tuple[PreTrainedModel, list[float]]:
    """Pre-train one model on a stream of tokens, ``(length,)``; the seed of its training is that of its weights too.

    Returns:
        The model and the loss of every step.
    """
    model = make_llama(
        recipe.shape,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        seed=recipe.training.seed,
    ).to(device)
    losses = pretrain(
        model, tokens, recipe.training, progress=progress, checkpoint=checkpoint, checkpoint_every=checkpoint_every
    )
    return model, losses


def pretrain(
    model: PreTrainedModel,
    tokens: Tensor,
    config: PretrainConfig,
    *,
    progress: ProgressCallback | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int = 100,
) -> list[float]:
    """Train ``model`` in place to predict each next token of the stream.

    The same model, tokens, config, machine and number of threads give the same weights bit for bit on a CPU, whether or
    not the training was ended and went on from its checkpoint. Other machines add their numbers in another order, and
    give a model of the same quality instead.

    Args:
        model: Any causal LM, with float32 weights, on the device where it is to be trained.
        tokens: The stream, ``(length,)``, int64, on the CPU. It must be longer than one window.
        config: How to train.
        progress: Told about every step, or None.
        checkpoint: File from which the training goes on if it is there, and which is written now and then; None: no
            such file.
        checkpoint_every: Steps between two checkpoints.

    Returns:
        The loss of every step in nats per token, before the step was taken.

    Raises:
        DataError: The stream is not longer than one window.
        RunError: The checkpoint is damaged or that of another training.
    """
    if len(tokens) <= config.window:
        raise DataError(
            f"the texts come to {len(tokens)} tokens, and must come to more than a window of {config.window}",
            remedy="give more text, or a shorter window (--window)",
        )
    device = model.device
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )
    offsets = torch.arange(config.window + 1)  # (window + 1,)
    losses: list[float] = []
    if checkpoint is not None and checkpoint.exists():
        losses = _go_on(checkpoint, config, model, optimizer, generator)
    was_training = model.training
    model.train()
    for step in range(len(losses), config.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, config)
        starts = torch.randint(len(tokens) - config.window, (config.batch_size, 1), generator=generator)
        windows = tokens[starts + offsets].to(device)  # (batch, window + 1)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=has_fast_bfloat16(device)):
            logits = model(input_ids=windows[:, :-1], use_cache=False).logits  # (batch, window, vocab)
        loss = F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        losses.append(loss.item())
        if checkpoint is not None and ((step + 1) % checkpoint_every == 0 or step + 1 == config.steps):
            _write_checkpoint(checkpoint, config, model, optimizer, generator, losses)
        if progress is not None:
            progress(step + 1, losses[-1])
    model.train(was_training)
    return losses


def _write_checkpoint(
    path: Path,
    config: PretrainConfig,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    losses: list[float],
) -> None:
    tensors = {"generator": generator.get_state(), "losses": torch.tensor(losses, dtype=torch.float64)}
    for name, weight in model.named_parameters():
        tensors[f"weight {name}"] = weight.detach()
        for part, value in optimizer.state[weight].items():
            tensors[f"{part} {name}"] = value
    # Copied, because safetensors refuses tensors that share memory.
    whole = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    write_file(path, save(whole, metadata={"config": json.dumps(asdict(config))}))


def _go_on(
    path: Path,
    config: PretrainConfig,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> list[float]:
    """Put everything back as it was when the checkpoint was written; the losses so far."""
    remedy = "remove it to begin anew"
    try:
        with safe_open(path, framework="pt") as file:
            recorded = json.loads((file.metadata() or {}).get("config", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (OSError, SafetensorError, ValueError) as error:
        raise RunError(f"the checkpoint cannot be read ({error})", place=str(path), remedy=remedy) from error
    names = [name for name, _ in model.named_parameters()]
    shapes = {f"weight {name}": weight.shape for name, weight in model.named_parameters()}
    found = {name: tensor.shape for name, tensor in tensors.items() if name.startswith("weight ")}
    if recorded != json.loads(json.dumps(asdict(config))) or found != shapes:
        raise RunError("the checkpoint is of another training", value=recorded, place=str(path), remedy=remedy)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(tensors[f"weight {name}"])
    state = {
        index: {part: tensors[f"{part} {name}"] for part in ("step", "exp_avg", "exp_avg_sq")}
        for index, name in enumerate(names)
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    generator.set_state(tensors["generator"])
    losses: list[float] = tensors["losses"].tolist()
    return losses


def stream_loss(model: PreTrainedModel, tokens: Tensor, *, window: int, batch_size: int = 16) -> float:
    """What a stream of tokens costs a model, read in windows that follow each other.

    Args:
        model: Any causal LM.
        tokens: The stream, ``(length,)``, int64, at least two tokens.
        window: Predicted tokens per window; the first token of the stream is not predicted, and what is left behind the
            last whole window is a shorter one.
        batch_size: Windows per pass.

    Returns:
        Nats per predicted token.
    """
    was_training = model.training
    model.eval()
    nats, last = 0.0, len(tokens) - 1
    whole = tokens[: last // window * window + 1].unfold(0, window + 1, window) if last >= window else tokens[:0]
    passes = [*whole.split(batch_size)] if len(whole) else []
    if last % window:
        passes.append(tokens[last // window * window :][None])
    with torch.no_grad():
        for windows in passes:  # (batch, window + 1)
            logits = model(input_ids=windows[:, :-1].to(model.device), use_cache=False).logits
            targets = windows[:, 1:].flatten().to(model.device)
            nats += float(F.cross_entropy(logits.float().flatten(0, 1), targets, reduction="sum"))
    model.train(was_training)
    return nats / last


def learning_rate_at(step: int, config: PretrainConfig) -> float:
    """The learning rate of a step, counted from 0: linear warm-up times cosine decay."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    cosine = 0.5 * (1.0 + math.cos(math.pi * step / config.steps))
    floor = config.final_learning_rate_fraction
    return config.learning_rate * warmup * (floor + (1.0 - floor) * cosine)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware; emulated, it is many times slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        read_capabilities = getattr(torch.cpu, "get_capabilities", dict)  # not in every supported torch
        capabilities: dict[str, bool] = read_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False
