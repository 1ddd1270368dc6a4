"""The proxy-tuned large model, as an ordinary causal LM of transformers.

:class:`ProxyModel` runs a large and two small models side by side and returns their combined scores (``logits.py`` has
the formula), so everything that works on a causal LM works on it: ``generate()`` with sampling, beams, streamers and
assistants, teacher-forced scoring, evaluation harnesses. Importing this module registers it with ``AutoConfig`` and
``AutoModelForCausalLM``.

Each of the three models keeps its own key-value cache. :class:`ProxyCache` presents them as one, because generation
edits the cache between two forward passes: beams reorder it, and assisted generation crops it. (A LogitsProcessor that
hides the small models has no part in those edits, and then gives wrong tokens without any error.)

On disk a proxy is a small folder (``proxy_folder.py``).
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg

from fedpt_flwr import packing
from fedpt_flwr.builds import build_of
from fedpt_flwr.errors import ModelError
from fedpt_flwr.generation import AUTO, Drafts, Generation, is_lossless
from fedpt_flwr.graphs import graphed
from fedpt_flwr.lean import has_kernels, step_function
from fedpt_flwr.logits import (
    check_alpha,
    check_plausibility,
    combine_logits,
    common_vocab_size,
    fill_hidden,
    mask_implausible,
)
from fedpt_flwr.models import (
    check_plain,
    hides_tokens,
    input_device,
    is_remote,
    longrope_switch,
    max_positions,
    output_size,
    steady_positions,
)
from fedpt_flwr.placement import Placement
from fedpt_flwr.proxy_folder import (
    Models,
    ProxyConfig,
    base_model,
    checked,
    dtype_name,
    is_adapted,
    is_adapter,
    known_dtype,
    load_large,
    load_small,
    proxy_folder,
    read_config,
    write_folder,
)
from fedpt_flwr.ragged import Stepper
from fedpt_flwr.sampling import Seeded, sample
from fedpt_flwr.speculative import PARTS, Speculation
from fedpt_flwr.vocabulary import match_vocabularies, missing_ids, translate

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

FILL, RESTRICT = "fill", "restrict"
"""What can become of tokens that a remote large model does not show."""

# What AutoModelForCausalLM hands on from its own work, or what only matters for files on a hub.
_AUTO_ARGUMENTS = frozenset(
    {
        "_from_auto",
        "adapter_kwargs",
        "cache_dir",
        "code_revision",
        "force_download",
        "local_files_only",
        "low_cpu_mem_usage",
        "proxies",
        "revision",
        "subfolder",
        "token",
        "trust_remote_code",
    }
)


class ProxyCache(Cache):
    """Three key-value caches that are edited as one.

    ``layers`` holds the layers of all three, the large model's first, so what the base class does to each layer (crop,
    reorder, select rows) reaches every model.

    Args:
        caches: One cache per model, in the order large, tuned, untuned, with all their layers already there.
    """

    def __init__(self, caches: Sequence[Cache]) -> None:
        super().__init__(layers=[layer for cache in caches for layer in cache.layers])
        self.caches = tuple(caches)


class ProxyModel(PreTrainedModel, GenerationMixin):
    """A frozen large LM, steered at decoding time by what tuning changed in a small one.

    The three models stay where they are: they may be on different devices and have different dtypes. **They are
    frozen and put in evaluation mode in place**; to go on tuning the small model, give the proxy a copy of it.

    ``generate()`` and ``forward()`` take ``alpha`` and ``plausibility`` as keywords too, for one call, either as a
    number or as a tensor with one value per row of the batch.

    Args:
        large: The large model.
        tuned: The tuned small model, plain or with a PEFT adapter.
        untuned: The small model before tuning. None (or the very model inside ``tuned``) means that ``tuned`` is an
            adapter on the untuned model: its weights are then used twice, once with the adapter switched off.
        alpha: Strength of the shift.
        plausibility: Threshold in [0, 1) of the mask over the tuned model's probabilities; 0 is off.
        vocab_size: Number of ids that are real tokens; None takes it from ``tokenizer``, or else requires that all
            three models score the same number of ids.
        tokenizer: The tokenizer of all three: its end-of-text and padding ids are used by ``generate()`` next to those
            of the large model's generation config.
        large_tokenizer: The large model's own, where it numbers tokens otherwise than ``tokenizer``: **the large model
            is translated in place** (``vocabulary.py``). None where both number them alike.

    Attributes:
        large: The large model.
        tuned: The tuned small model.
        untuned: The small model before tuning, or None where ``tuned`` without its adapter is that model.

    Raises:
        VocabularyMismatch: The models score different numbers of ids and nothing says how many are real, or there is no
            exact map between two tokenizers.
        ModelError: ``alpha`` or ``plausibility`` is out of range, or the pair of small models makes no sense.
    """

    config_class = ProxyConfig
    main_input_name = "input_ids"

    def __init__(
        self,
        large: PreTrainedModel,
        tuned: PreTrainedModel | PeftModel,
        untuned: PreTrainedModel | None = None,
        alpha: float = 1.0,
        plausibility: float = 0.0,
        *,
        vocab_size: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        large_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        check_alpha(alpha)
        check_plausibility(plausibility)
        if large_tokenizer is not None and tokenizer is not None:
            id_map = match_vocabularies(large_tokenizer, tokenizer).id_map
            if id_map is not None:
                translate(large, id_map)
        if untuned is not None and untuned is base_model(tuned) and is_adapted(tuned):
            untuned = None
        _check_pair(tuned, untuned)
        if vocab_size is None and tokenizer is not None:
            vocab_size = max(tokenizer.get_vocab().values()) + 1
        width = output_size(large)
        tuned_width = output_size(tuned)
        untuned_width = tuned_width if untuned is None else output_size(untuned)
        models = [model for model in (large, tuned, untuned) if model is not None]
        real_vocab_size = common_vocab_size(width, tuned_width, untuned_width, vocab_size=vocab_size)
        generation_config = _generation_config(large, tokenizer, real_vocab_size)
        super().__init__(
            ProxyConfig(
                alpha=float(alpha),
                plausibility=float(plausibility),
                vocab_size=width,
                real_vocab_size=real_vocab_size,
                max_position_embeddings=_shortest_context(models),
                bos_token_id=generation_config.bos_token_id,
                eos_token_id=generation_config.eos_token_id,
                pad_token_id=generation_config.pad_token_id,
            )
        )
        # post_init is left out on purpose: it would initialise weights that are already there.
        self.all_tied_weights_keys: dict[str, str] = {}
        self.loss_type = "ForCausalLM"
        self.generation_config = generation_config
        self.large = large
        self.tuned = tuned
        self.untuned = untuned
        self.requires_grad_(False)
        self.eval()
        # For without_adapter(): peft's disable_adapter() walks the whole model at every call, a hundred times as long,
        # and makes the adapter trainable again.
        self._adapter_layers = [] if untuned is not None else [part for part in tuned.modules() if is_adapter(part)]
        self._speculation: Speculation | None = None
        self._is_prepared = False
        self._alone = threading.RLock()  # an adapter is switched on and off for all threads
        self._accepted = [frozenset(inspect.signature(base_model(model).forward).parameters) for model in models]
        switches = [longrope_switch(base_model(model)) for model in models]
        self._longrope_switches = [switch for switch in switches if switch is not None]
        lengths = [steady_positions(base_model(model)) for model in models]
        self._steady = min((length for length in lengths if length is not None), default=None)

    @property
    def steady_context(self) -> int | None:
        """The longest text in tokens that all models read, each key as it is in any longer one; None: any."""
        known = (self.config.max_position_embeddings, self._steady)
        return min((length for length in known if length is not None), default=None)

    @property
    def device(self) -> torch.device:
        """Where prompts are put: where the large model takes its inputs."""
        return input_device(self.large)

    @property
    def alpha(self) -> float:
        """Strength of the shift; may be set at any time."""
        return float(self.config.alpha)

    @alpha.setter
    def alpha(self, value: float) -> None:
        check_alpha(value)
        self.config.alpha = float(value)

    @property
    def plausibility(self) -> float:
        """Threshold of the mask in [0, 1), 0 is off; may be set at any time."""
        return float(self.config.plausibility)

    @plausibility.setter
    def plausibility(self, value: float) -> None:
        check_plausibility(value)
        self.config.plausibility = float(value)

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: ProxyCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        alpha: float | Tensor | None = None,
        plausibility: float | Tensor | None = None,
        hidden: str | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Score the next token at every position.

        Args:
            input_ids: ``(batch, seq)``, int64; with a cache, the new tokens only.
            attention_mask: ``(batch, cached + seq)``, 1 for tokens and 0 for padding; None means no padding.
            position_ids: ``(batch, seq)``, int64, or None for consecutive positions.
            cache: What :meth:`new_cache` or an earlier call returned; extended in place.
            labels: ``(batch, seq)``, int64, the same ids as ``input_ids`` with -100 where no loss is wanted; they are
                shifted inside.
            use_cache: Whether to return a cache; None follows the config.
            logits_to_keep: Score only the last so many positions (0 is all), or the positions in this tensor.
            alpha: Strength for this call; None takes :attr:`alpha`.
            plausibility: Mask threshold for this call; None takes :attr:`plausibility`.
            hidden: What becomes of tokens that a remote large model does not show: ``fill`` shares out their
                probability as the untuned model would, ``restrict`` rules them out. None is ``fill``;
                :meth:`generate` goes by ``remote.hidden``.
            return_dict: False returns a tuple.
            **kwargs: Other arguments of transformers models; refused, unless None or False.

        Returns:
            ``logits``: ``(batch, kept, vocab)``, float32, on the large model's device; ``loss``: mean nats per label,
            always of the scores without the mask, or None without labels; ``cache``: the cache or None.

        Raises:
            ModelError: An argument cannot be used with a proxy.
        """
        # generate() hands the tokenizer of its stop strings on to every pass.
        _refuse({name: value for name, value in kwargs.items() if name != "tokenizer"})
        if input_ids is None:
            raise ModelError(
                "a proxy reads input_ids: its models have different embeddings", value="inputs_embeds or nothing"
            )
        if cache is not None and not isinstance(cache, ProxyCache):
            raise ModelError(
                "cache of a proxy must be a ProxyCache",
                value=type(cache).__name__,
                remedy="start from proxy.new_cache()",
            )
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ModelError("labels need the scores of every position", remedy="leave logits_to_keep out")
        alpha = self.alpha if alpha is None else alpha
        plausibility = self.plausibility if plausibility is None else plausibility
        check_alpha(alpha)
        check_plausibility(plausibility)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and cache is None:
            cache = self.new_cache()

        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        caches = (None, None, None) if cache is None else cache.caches
        large, tuned, untuned = (
            _score(part, inputs, cache, logits_to_keep=logits_to_keep, use_cache=bool(use_cache))
            for part, cache in zip(self._parts(), caches, strict=True)
        )

        vocab_size = self.config.real_vocab_size
        if hidden != RESTRICT:
            large = self.fill(large, untuned)
        scores = combine_logits(large, tuned, untuned, alpha=alpha, vocab_size=vocab_size)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=scores, labels=labels, vocab_size=scores.shape[-1])
        # Only now: losses are those of all tokens.
        mask_implausible(scores, tuned, plausibility=plausibility, vocab_size=vocab_size)
        output = CausalLMOutputWithPast(loss=loss, logits=scores, cache=cache if use_cache else None)
        return output.to_tuple() if return_dict is False else output

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        *args: Any,
        seed: int | Sequence[int] | None = None,
        draft_tokens: int | Literal["auto"] | None = AUTO,
        **kwargs: Any,
    ) -> Any:
        """Generate as every model of transformers does, but faster, and sample so that a seed gives a row one text.

        Where ``do_sample`` is true, the tokens of a row are drawn by noise that depends only on the row's seed, the
        index of the new token, and the id: neither on the rest of the batch nor on its order. Beams, assistants and
        loops of ``custom_generate`` draw from torch's generators as ever.

        The tuned model drafts tokens, and the others verify several at once (``speculative.py``). The tokens that come
        out are the same, up to ties within rounding. What cannot be decoded so (beams, processors and criteria that
        are not transformers' own, a cache of the caller's) is left to transformers' loop.

        Several threads may call it; where one copy of the small weights is both tuned and untuned, one after the other.

        Args:
            inputs: The prompts, ``(batch, seq)``; or pass ``input_ids``.
            generation_config: As in transformers.
            logits_processor: As in transformers.
            *args: As in transformers.
            seed: Of sampling: one number, to which the index of the row is added, or one per row. Rows are those of
                the result: each prompt counts ``num_return_sequences`` times. None draws one from torch's global
                generator, so ``torch.manual_seed`` repeats a call.
            draft_tokens: Tokens to draft at a time: ``auto`` as many as pay, a number, or 0 for none. None decodes with
                transformers' own loop, which alone returns a cache to go on with.
            **kwargs: As in transformers, and ``alpha`` and ``plausibility``.

        Raises:
            ModelError: ``seed`` is neither a whole number nor one per row, or an argument cannot be used with a proxy.
        """
        carried: list[Any] = [] if seed is None else [Seeded(seed)]
        if draft_tokens != AUTO:
            carried.append(Drafts(draft_tokens))
        if self.hides_tokens and "hidden" not in kwargs:
            config = self.generation_config if generation_config is None else generation_config
            samples = kwargs.get("do_sample")
            samples = config.do_sample if samples is None else samples
            kwargs["hidden"] = FILL if self.large.fills(samples=bool(samples)) else RESTRICT
        if carried:
            logits_processor = LogitsProcessorList([*(logits_processor or ()), *carried])
        with nullcontext() if self.untuned is not None else self._alone:
            return super().generate(inputs, generation_config, logits_processor, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has step functions of its own models, and not of these.
        return {name: value for name, value in self.__dict__.items() if name != "_alone"} | {"_speculation": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._alone = threading.RLock()

    @property
    def hides_tokens(self) -> bool:
        """Whether the large model shows the log-probabilities of its likeliest tokens only."""
        return hides_tokens(self.large)

    def fill(self, large: Tensor, untuned: Tensor) -> Tensor:
        """The large model's scores, with an estimate for tokens that it does not show; see ``logits.fill_hidden``."""
        if not self.hides_tokens:
            return large
        return fill_hidden(large, untuned, vocab_size=self.config.real_vocab_size)

    def new_cache(self) -> ProxyCache:
        """An empty cache for this proxy's three models."""
        untuned = self.tuned if self.untuned is None else self.untuned
        return ProxyCache(
            [DynamicCache(config=base_model(model).config) for model in (self.large, self.tuned, untuned)]
        )

    def steppers(self, known: Mapping[str, Stepper] | None = None) -> dict[str, Stepper]:
        """A step function for each of ``large``, ``tuned`` and ``untuned``: what a scheduler batches requests with.

        Args:
            known: Those of a proxy that shares models with this one. They are taken for the shared models, so that
                rows of both proxies can share a pass, and need not be found again.

        Raises:
            ModelError: One of the models cannot take rows of different lengths.
        """
        models = {"large": self.large, "tuned": self.tuned, "untuned": self.untuned}
        steppers: dict[str, Stepper] = {}
        for name, model in models.items():
            if known is not None and model is not None and known[name].model is model:
                steppers[name] = known[name]
                continue
            # Without an untuned model, one copy of the small weights is both, with the adapter and without.
            step = step_function(self.tuned, self.without_adapter) if model is None else step_function(model)
            steppers[name] = graphed(step) if self._is_prepared else step
        return steppers

    def prepare(self) -> ProxyModel:
        """Lay out the models' weights for decoding, in place; results stay the same up to rounding.

        Large and untuned, which judge several tokens in a pass, always; tuned, which drafts one after the other, where
        that makes a pass over one token no slower. Until :meth:`restore` the weights cannot be saved, changed, moved or
        converted, and neither call may be made while another thread decodes. A model that several proxies share is
        prepared and restored for all of them. See ``packing.py``. On a GPU weights stay as they are, or some lie side
        by side, and passes over few tokens are recorded as CUDA graphs when they are first needed; see ``graphs.py``.

        Returns:
            This proxy.
        """
        for name, model in (("large", self.large), ("untuned", self.untuned), ("tuned", self.tuned)):
            if model is None:
                continue
            for_loops = build_of(model) is not None
            if name != "tuned" or packing.suits_single_rows(model.dtype, for_loops=for_loops):
                packing.prepare(model, for_loops=for_loops)
            if has_kernels(model):
                packing.join(model)
        self._is_prepared, self._speculation = True, None
        return self

    def restore(self) -> ProxyModel:
        """Undo :meth:`prepare`, in place.

        Returns:
            This proxy.
        """
        packing.restore(self)
        self._is_prepared, self._speculation = False, None
        return self

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Make ``tuned`` the untuned model for a while, where one copy of the small weights serves as both.

        It is a switch in the model itself, so no other thread may use ``tuned`` meanwhile.
        """
        for layer in self._adapter_layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in self._adapter_layers:
                layer._disable_adapters = False

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        large_ref: str | None = None,
        untuned_ref: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Write the proxy folder: ``config.json``, the tuned small model in ``tuned/``, and a tokenizer if given.

        The large and the untuned model are not copied but referred to, each with a fingerprint of its weights that is
        checked on loading. ``config.json`` is written last: a folder without one is not complete.

        Args:
            save_directory: The folder; made if missing, overwritten if it holds a proxy.
            large_ref: ``demo:large``, a hub id or a folder. None keeps what the proxy was loaded with, or what
                transformers remembers of the model.
            untuned_ref: The same for the small model before tuning; :data:`BUNDLED` writes its weights into the
                folder ``untuned``.
            tokenizer: Saved into the folder, so that ``AutoTokenizer.from_pretrained`` finds it there.

        Raises:
            ModelError: It is unknown where a model came from, an adapter does not belong to the untuned model, or the
                proxy is prepared for decoding.
        """
        check_plain(self)
        self.config.architectures = [type(self).__name__]
        write_folder(
            Path(save_directory), self._models(), large_ref=large_ref, untuned_ref=untuned_ref, tokenizer=tokenizer
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        large: str | Path | PreTrainedModel | None = None,
        large_device_map: str | None = None,
        large_max_memory: str | None = None,
        large_offload_folder: str | None = None,
        like: ProxyModel | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        config: ProxyConfig | None = None,
        prepare: bool = False,
        **kwargs: Any,
    ) -> ProxyModel:
        """Load a proxy and the models that it refers to.

        Args:
            pretrained_model_name_or_path: The folder of a run, or the proxy folder in it.
            large: Where the large model is on this machine, or the model itself, if not where the folder says.
            large_device_map: How the large model is divided among devices, instead of as it was when the proxy was
                saved; see :class:`~fedpt_flwr.placement.Placement`. Empty: it is not.
            large_max_memory: The same of what devices may take.
            large_offload_folder: The same of where weights are put that go to disk.
            like: A proxy that is loaded already. Its large and its untuned model are used again where they are the
                ones that the folder refers to, and of the dtype that is wanted.
            device: Torch device of the models that are loaded, or ``auto``; None is that of ``large`` if it is loaded
                already, else the CPU.
            dtype: Dtype to convert all three models to, of which ``large`` must be if it is loaded already; None leaves
                them as they were when the proxy was saved.
            config: Settings to use instead of the folder's ``config.json``.
            prepare: Lay the weights out for decoding, see :meth:`prepare`. What ``like`` shares with this proxy may be
                prepared already, and then stays so.
            **kwargs: What ``AutoModelForCausalLM`` hands on: ``device_map`` with one device is understood, arguments
                about hub files are ignored, others are refused.

        Raises:
            ModelError: The folder is missing, damaged or no proxy; a model cannot be loaded, or is not the one that
                the proxy was made with, or would have to be converted although it is not this proxy's alone.
        """
        device_map = kwargs.pop("device_map", None)
        if device is None and device_map is None and isinstance(large, nn.Module):
            device = str(input_device(large))
        device = _one_device(device, device_map)
        dtype = kwargs.pop("torch_dtype", None) if dtype is None else dtype
        convert_to = None if dtype in (None, "auto") else getattr(torch, known_dtype(dtype, place="dtype"))
        _refuse({name: value for name, value in kwargs.items() if name not in _AUTO_ARGUMENTS})
        folder = proxy_folder(Path(pretrained_model_name_or_path))
        config = checked(read_config(folder) if config is None else config, folder)

        placement = Placement.from_entry(config.large)
        placement = placement.elsewhere(large_device_map, large_max_memory, large_offload_folder)
        if convert_to is not None and placement.to_entry():
            raise ModelError(
                "a proxy whose large model is divided or quantised cannot be converted",
                value=str(dtype),
                place="dtype",
                remedy="load the models as you like and call ProxyModel(large, tuned, untuned)",
            )
        wanted = None if convert_to is None else str(convert_to).removeprefix("torch.")
        if isinstance(large, nn.Module) and not is_remote(large) and wanted not in (None, dtype_name(large)):
            raise ModelError(
                "a large model that is loaded already is not converted, because others may use it",
                value=dtype_name(large),
                place="dtype",
                remedy=f"give it in {wanted}, or say where it is instead",
            )
        others = None if like is None else like._models()
        large_model = load_large(folder, config, large, device, placement, like=others, dtype=wanted)
        tuned, untuned = load_small(folder, config, device, like=others, dtype=wanted)
        model = cls(large_model, tuned, untuned, config.alpha, config.plausibility, vocab_size=config.real_vocab_size)
        for name in ("large", "untuned", "tuned", "bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(model.config, name, getattr(config, name))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(model.generation_config, name, getattr(config, name))
        model.config.name_or_path = str(folder)
        model.name_or_path = str(folder)
        if wanted is not None:
            tuned.to(convert_to)
            for part in (large_model, untuned):  # a part that others use has the dtype already, and may be prepared
                if part is not None and not is_remote(part) and dtype_name(part) != wanted:
                    part.to(convert_to)
            for entry in (config.tuned, config.untuned, *([] if is_remote(large_model) else [config.large])):
                entry["dtype"] = wanted  # as it is now, for a proxy that is loaded like this one
        return model.prepare() if prepare else model

    def prepare_inputs_for_generation(self, input_ids: Tensor, cache: Cache | None = None, **kwargs: Any) -> Any:
        """Read a text anew where a model's rotary positions take other frequencies, as Phi-3 does in ``generate()``."""
        if cache is not None and any(input_ids.shape[1] > n >= cache.get_seq_length() for n in self._longrope_switches):
            cache = None
            kwargs["next_sequence_length"] = None
        return super().prepare_inputs_for_generation(input_ids, cache=cache, **kwargs)

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Give ``generate()`` a composite cache where it would make a plain one."""
        if model_kwargs.get("cache") is not None or generation_config.use_cache is False:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
            return
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ModelError(
                "a proxy decodes with dynamic caches",
                value=generation_config.cache_implementation,
                place="cache_implementation",
                remedy="leave it out",
            )
        model_kwargs["cache"] = self.new_cache()
        if generation_config.is_assistant:
            model_kwargs["cache"].activate_past_recording()

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **kwargs: Any,
    ) -> Any:
        """What ``generate()`` decodes with where it has neither beams nor an assistant."""
        draft_tokens = next((part.draft_tokens for part in logits_processor if isinstance(part, Drafts)), AUTO)
        if draft_tokens is not None:
            arguments = (input_ids, logits_processor, stopping_criteria, generation_config)
            # Rows of different lengths must not be past the length at which keys change, one for all of them.
            is_steady = self._steady is None or (generation_config.max_length or math.inf) <= self._steady
            speculation = self.speculation() if is_steady and is_lossless(*arguments, **kwargs) else None
            if speculation is not None:
                rules = self._rules(*arguments, **kwargs)
                speculation.decode(rules.prompts, rules, draft_tokens=draft_tokens)
                return rules.result()
            if draft_tokens != AUTO:
                _log.warning("draft_tokens has no effect here: transformers' own loop decodes")
        loop = super()._sample
        if generation_config.do_sample:
            return sample(loop, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)
        return loop(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)

    def speculation(self) -> Speculation | None:
        """What :meth:`generate` decodes with by itself; None where a model cannot take rows of different lengths."""
        known = self._speculation
        if known is None or any(
            known.steps[name].model is not part.model or not known.steps[name].is_current
            for name, part in zip(PARTS, self._parts(), strict=True)
        ):
            try:
                self._speculation = Speculation(self.steppers(), self.steady_context)
            except ModelError as error:
                _log.debug("decodes without speculation: %s", error)
                self._speculation = None
        return self._speculation

    def _rules(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        *,
        attention_mask: Tensor | None = None,
        streamer: Any = None,
        alpha: float | Tensor | None = None,
        plausibility: float | Tensor | None = None,
        hidden: str | None = None,
        **_kwargs: Any,
    ) -> Generation:
        """The arguments of ``_sample`` and this proxy's formula, as rules for speculation."""
        alpha = self.alpha if alpha is None else alpha
        plausibility = self.plausibility if plausibility is None else plausibility
        check_alpha(alpha)
        check_plausibility(plausibility)
        vocab_size, width, num_rows = self.config.real_vocab_size, self.config.vocab_size, len(input_ids)
        missing = missing_ids(self.large)
        if missing is not None:  # once, and not for every token that is drafted
            missing = missing.to(input_device(self.tuned))

        def of_rows(value: float | Tensor, rows: Tensor) -> float | Tensor:
            has_rows = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == num_rows
            return value[rows.to(value.device)] if isinstance(value, Tensor) and has_rows else value

        def combine(large: Tensor, tuned: Tensor, untuned: Tensor, rows: Tensor) -> Tensor:
            return combine_logits(
                large if hidden == RESTRICT else self.fill(large, untuned),
                tuned,
                untuned,
                alpha=of_rows(alpha, rows),
                plausibility=of_rows(plausibility, rows),
                vocab_size=vocab_size,
            )

        def draft_scores(tuned: Tensor, rows: Tensor) -> Tensor:
            scores = tuned.new_full((len(tuned), width), -torch.inf, dtype=torch.float32)
            scores[:, :vocab_size] = tuned[:, :vocab_size]
            if missing is not None:  # the large model reads what is drafted, and never chooses these
                scores[:, missing] = -torch.inf
            mask_implausible(scores, scores, plausibility=of_rows(plausibility, rows), vocab_size=vocab_size)
            return scores

        return Generation(
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            attention_mask=attention_mask,
            streamer=streamer,
            combine=combine,
            draft_scores=draft_scores,
        )

    def _models(self) -> Models:
        return Models(self.large, self.tuned, self.untuned, self.config)

    def _parts(self) -> Iterator[_Part]:
        """Large, tuned and untuned, each with the context in which it is that."""
        yield _Part(self.large, self._accepted[0], nullcontext())
        yield _Part(self.tuned, self._accepted[1], nullcontext())
        if self.untuned is None:
            yield _Part(self.tuned, self._accepted[1], self.without_adapter())
        else:
            yield _Part(self.untuned, self._accepted[2], nullcontext())


class _Part(NamedTuple):
    """One of the three models, ready to be called."""

    model: PreTrainedModel | PeftModel
    accepted: frozenset[str]
    """Names of the arguments that its forward pass takes."""
    context: AbstractContextManager[None]
    """Where it must be called."""


def _score(
    part: _Part,
    inputs: Mapping[str, Tensor | None],
    cache: Cache | None,
    *,
    logits_to_keep: int | Tensor,
    use_cache: bool,
) -> Tensor:
    """One model's scores, ``(batch, kept, width)``, in its own dtype and on its own device."""
    device = input_device(part.model)
    arguments: dict[str, Any] = {
        name: value.to(device) for name, value in inputs.items() if value is not None and name in part.accepted
    }
    if isinstance(logits_to_keep, Tensor):
        logits_to_keep = logits_to_keep.to(device)
    slices_itself = "logits_to_keep" in part.accepted
    if slices_itself:
        arguments["logits_to_keep"] = logits_to_keep
    with part.context:
        logits: Tensor = part.model(**arguments, cache=cache, use_cache=use_cache, return_dict=True).logits
    if slices_itself:
        return logits
    return logits[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else logits[:, logits_to_keep]


def _check_pair(tuned: PreTrainedModel | PeftModel, untuned: PreTrainedModel | None) -> None:
    if untuned is None and not is_adapted(tuned):
        raise ModelError(
            "the untuned model may be left out only if the tuned one carries a PEFT adapter",
            value=type(tuned).__name__,
            remedy="pass the small model as it was before tuning",
        )
    if is_adapted(tuned):
        if untuned is tuned:
            raise ModelError(
                "tuned and untuned must differ, but are the same adapted model",
                remedy="leave untuned out: the proxy then switches the adapter off for it",
            )
        if tuned.active_peft_config.is_prompt_learning:
            raise ModelError(
                "a tuned model's adapter must change its layers, not its prompt",
                value=str(tuned.active_peft_config.peft_type),
                remedy="tune with LoRA, or fully",
            )


def _generation_config(
    large: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int
) -> GenerationConfig:
    """The large model's defaults; decoding also ends where the tokenizer says that a text does."""
    config = copy.deepcopy(large.generation_config)
    config.cache_implementation = None
    ends = config.eos_token_id if config.eos_token_id is not None else []
    ends = [ends] if isinstance(ends, int) else list(ends)
    if tokenizer is not None:
        if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
            ends.append(tokenizer.eos_token_id)
        if config.pad_token_id is None:
            config.pad_token_id = tokenizer.pad_token_id
    if config.pad_token_id is not None and config.pad_token_id >= vocab_size:
        config.pad_token_id = None  # the small models could not read it
    if ends:
        config.eos_token_id = ends[0] if len(ends) == 1 else ends
        if config.pad_token_id is None:
            config.pad_token_id = ends[0]
    return config


def _shortest_context(models: Sequence[PreTrainedModel | PeftModel]) -> int | None:
    lengths = [max_positions(base_model(model)) for model in models]
    return min((length for length in lengths if length is not None), default=None)


def _refuse(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that ask for something which a proxy cannot do."""
    asked = sorted(name for name, value in arguments.items() if value is not None and value is not False)
    if asked:
        raise ModelError(
            "a proxy does not take these arguments", value=asked, remedy="ask its parts: proxy.large, proxy.tuned"
        )


def _one_device(device: str | torch.device | None, device_map: Any) -> str:
    """The device that ``device`` or ``device_map`` means; models that are split over devices are loaded by hand."""
    if device is None and isinstance(device_map, dict) and len(device_map) == 1:
        device_map = next(iter(device_map.values()))
    wanted = device if device is not None else device_map
    if wanted is None:
        return "cpu"
    if isinstance(wanted, int):
        return f"cuda:{wanted}"
    if not isinstance(wanted, str | torch.device):
        raise ModelError(
            "a proxy is loaded onto one device",
            value=wanted,
            place="device_map",
            remedy="load the three models as you like and call ProxyModel(large, tuned, untuned)",
        )
    return str(wanted)


AutoConfig.register(ProxyConfig.model_type, ProxyConfig, exist_ok=True)
AutoModelForCausalLM.register(ProxyConfig, ProxyModel, exist_ok=True)
