import json
import warnings

import pytest
import torch
from tiny import VOCAB, tiny_gpt2, tiny_llama, tiny_tokenizer

from fedpt_flwr.config import TuningConfig
from fedpt_flwr.errors import ModelError
from fedpt_flwr.models import (
    bring_back,
    cpu_threads,
    cut_adapter,
    fingerprint,
    frozen_fingerprint,
    load_adapter,
    load_causal_lm,
    load_tokenizer,
    make_tunable,
    max_positions,
    model_without_weights,
    output_size,
    pick_device,
    put_away,
    resolve_model,
    set_arrays,
    tunable_arrays,
)

# peft and older code of transformers ask transformers by a name that it has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

LORA = TuningConfig(mode="lora", lora_rank=2)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A folder with a model and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(3).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


# --- references ---


def test_a_hub_id_stays_and_an_absolute_folder_stays(stored):
    assert resolve_model("owner/name") == "owner/name"
    assert resolve_model("gpt2") == "gpt2"
    assert resolve_model(str(stored)) == str(stored)


@pytest.fixture
def downloaded(tmp_path, monkeypatch):
    """A model of the hub in two revisions, as `hf download` keeps them; the hub itself is out of reach."""
    repo = tmp_path / "models--owner--name"
    for seed, (revision, commit) in enumerate({"main": "a" * 40, "v1": "b" * 40}.items()):
        tiny_llama(seed, max_position_embeddings=64 + seed).save_pretrained(repo / "snapshots" / commit)
        padding = ("<pad>", "<s>")[seed]
        tiny_tokenizer(eos_token="</s>", pad_token=padding).save_pretrained(repo / "snapshots" / commit)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / revision).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return repo


def test_a_hub_id_names_a_revision_behind_an_at_sign(downloaded):
    prints = {
        ref: fingerprint(load_causal_lm(ref))
        for ref in ("owner/name", "owner/name@main", "owner/name@v1", "owner/name@" + "b" * 40)
    }
    newest, tagged = (fingerprint(tiny_llama(seed)) for seed in (0, 1))
    assert newest != tagged
    assert list(prints.values()) == [newest, newest, tagged, tagged]
    assert [load_tokenizer(ref).pad_token for ref in ("owner/name", "owner/name@v1")] == ["<pad>", "<s>"]
    lengths = [max_positions(model_without_weights(ref)) for ref in ("owner/name", "owner/name@v1")]
    assert lengths == [64, 65]


def test_a_revision_that_is_not_here_cannot_be_loaded_without_the_hub(downloaded):
    for load in (load_causal_lm, load_tokenizer, model_without_weights):
        with pytest.raises(ModelError, match=r"hub cannot be reached.*`hf download owner/name --revision v2`"):
            load("owner/name@v2")


def test_an_at_sign_asks_for_a_revision():
    with pytest.raises(ModelError, match="after the @ of a hub id must stand a revision, got 'owner/name@'"):
        load_causal_lm("owner/name@")


def test_what_can_be_no_folder_here_is_a_name_for_the_hub():
    for ref in ("~nosuchuser/model", "a" * 300):  # of a user who is not known; longer than names may be
        assert resolve_model(ref) == ref
    with pytest.raises(ModelError, match="must be a folder that exists"):
        resolve_model("/" + "a" * 300)


@pytest.mark.parametrize("load", [resolve_model, load_tokenizer, load_causal_lm])
def test_a_folder_that_does_not_exist_is_reported(tmp_path, load):
    with pytest.raises(ModelError, match=r"must be a folder that exists, got '.*none'; check the path on the machine"):
        load(str(tmp_path / "none"))


@pytest.mark.parametrize("load", [resolve_model, load_tokenizer, load_causal_lm])
def test_a_folder_without_a_config_is_reported(tmp_path, load):
    with pytest.raises(ModelError, match=r"must hold config\.json and the weights"):
        load(str(tmp_path))


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match="must be a folder that exists"):
        resolve_model(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("ref", ["demo:medium", "demo:", "demo:../x", "demo:train"])
def test_a_demo_model_that_there_is_not_is_reported_with_those_there_are(ref):
    with pytest.raises(ModelError, match="the demo world has the models demo:small and demo:large, got"):
        resolve_model(ref)


# --- loading ---


def test_a_model_comes_back_as_it_was_saved_frozen_and_without_dropout(stored):
    model = load_causal_lm(str(stored))
    expected = dict(tiny_llama(3).named_parameters())
    assert dict(model.named_parameters()).keys() == expected.keys()
    for name, weight in model.named_parameters():
        assert torch.equal(weight, expected[name])
        assert not weight.requires_grad
    assert not model.training
    assert (output_size(model), max_positions(model)) == (VOCAB, 64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_loaded_in_the_type_that_is_asked_for(stored, dtype):
    model = load_causal_lm(str(stored), dtype=dtype)
    assert {weight.dtype for weight in model.parameters()} == {getattr(torch, dtype)}


def damaged(stored, folder, *, config=None, weights=None):
    folder.mkdir()
    for path in stored.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    if config is not None:
        old = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(old | config))
    if weights is not None:
        (folder / "model.safetensors").write_bytes(weights)
    return str(folder)


@pytest.mark.parametrize(
    "damage",
    [
        {"config": "{"},
        {"config": "{}"},
        {"config": "[]"},
        {"config": {"model_type": "nonsense"}},
        {"config": {"vocab_size": 99}},
        {"weights": b""},
        {"weights": b"junk" * 10},
    ],
)
def test_a_folder_that_holds_no_model_is_reported_in_one_line(stored, tmp_path, damage):
    ref = damaged(stored, tmp_path / "model", **damage)
    with pytest.raises(ModelError) as raised:
        load_causal_lm(ref)
    assert str(raised.value).startswith("the model cannot be loaded (")
    assert repr(ref) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_half_a_file_of_weights_is_reported(stored, tmp_path):
    whole = (stored / "model.safetensors").read_bytes()
    with pytest.raises(ModelError, match="the model cannot be loaded"):
        load_causal_lm(damaged(stored, tmp_path / "model", weights=whole[: len(whole) // 2]))


def test_a_tokenizer_comes_back_as_it_was_saved(stored):
    tokenizer = load_tokenizer(str(stored))
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "</s>")


def saved_tokenizer(folder, **special_tokens):
    tiny_tokenizer(**special_tokens).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return str(folder)


def test_a_tokenizer_without_padding_pads_with_its_end_of_text(tmp_path):
    tokenizer = load_tokenizer(saved_tokenizer(tmp_path, eos_token="</s>"))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"must have an end-of-text token.*; set eos_token in its tokenizer_config"):
        load_tokenizer(saved_tokenizer(tmp_path, pad_token="<pad>"))


@pytest.mark.parametrize("content", ["junk", "{}"])
def test_a_damaged_tokenizer_is_reported(stored, tmp_path, content):
    ref = damaged(stored, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded"):
        load_tokenizer(ref)


def test_an_adapter_comes_back_as_it_was_saved(tmp_path):
    model = make_tunable(tiny_llama(3), LORA, seed=1)
    set_arrays(model, {name: torch.full_like(values, 0.1) for name, values in tunable_arrays(model).items()})
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[3, 4, 5]])
    loaded = load_adapter(tiny_llama(3), tmp_path)
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    assert not any(weight.requires_grad for weight in loaded.parameters())


def test_an_adapter_of_another_model_or_of_none_is_reported(tmp_path):
    make_tunable(tiny_llama(3), LORA, seed=1).save_pretrained(tmp_path / "adapter")
    for base, folder in ((tiny_llama(3, hidden_size=32), "adapter"), (tiny_llama(3), "none")):
        with pytest.raises(ModelError, match="the adapter cannot be loaded"):
            load_adapter(base, tmp_path / folder)


# --- devices and threads ---


@pytest.mark.parametrize(("there", "picked"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_cuda_where_there_is_any_else_the_cpu(there, picked, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert pick_device("auto").type == picked
    assert pick_device("cpu").type == "cpu"


def test_a_device_that_is_not_there_is_reported(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ModelError, match=r"model\.device: this process sees 0 CUDA devices, got 'cuda'; use auto"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ModelError, match="this process sees 2 CUDA devices, got 'cuda:2'"):
        pick_device("cuda:2")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ModelError, match=r"model\.device: this machine has no MPS device"):
        pick_device("mps")


def test_threads_are_as_before_afterwards_even_after_an_error():
    before = torch.get_num_threads()
    with cpu_threads(3):
        assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == before
    with pytest.raises(KeyError), cpu_threads(3):
        raise KeyError
    assert torch.get_num_threads() == before


# --- what is tuned ---


def test_full_tuning_tunes_every_weight_and_tied_ones_once():
    model = make_tunable(load_frozen(tiny_llama()), TuningConfig(), seed=0)
    arrays = tunable_arrays(model)
    assert list(arrays) == [name for name, _ in model.named_parameters()]
    assert "lm_head.weight" not in arrays
    assert sum(values.numel() for values in arrays.values()) == sum(weight.numel() for weight in model.parameters())
    untied = make_tunable(tiny_llama(tie_word_embeddings=False), TuningConfig(), seed=0)
    assert "lm_head.weight" in tunable_arrays(untied)


def load_frozen(model):
    return model.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tunable_arrays_are_float32_copies(dtype):
    model = make_tunable(tiny_llama().to(dtype), TuningConfig(), seed=0)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for name, values in tunable_arrays(model).items():
        assert values.dtype == torch.float32
        assert not values.requires_grad
        assert torch.equal(values, before[name].float())
        values.zero_()
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_lora_tunes_two_matrices_of_the_rank_for_each_target():
    model = make_tunable(
        load_frozen(tiny_llama()), TuningConfig(mode="lora", lora_rank=2, lora_targets="q_proj, up_proj"), seed=0
    )
    shapes = {name: tuple(values.shape) for name, values in tunable_arrays(model).items()}
    expected = {}
    for layer in (0, 1):
        for module, rows in (("self_attn.q_proj", 16), ("mlp.up_proj", 24)):
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            expected |= {f"{prefix}.lora_A.default.weight": (2, 16), f"{prefix}.lora_B.default.weight": (rows, 2)}
    assert shapes == expected


def test_all_linear_means_every_linear_layer_but_the_output():
    names = tunable_arrays(make_tunable(tiny_llama(), LORA, seed=0))
    modules = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names}
    assert modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_an_adapter_is_made_and_loaded_without_a_warning_that_nobody_can_heed(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_tunable(load_frozen(tiny_llama()), LORA, seed=0).save_pretrained(tmp_path)
        load_adapter(load_frozen(tiny_llama()), tmp_path)
    assert [str(warning.message) for warning in caught] == []


def test_lora_works_on_the_conv1d_layers_of_gpt2():
    base = tiny_gpt2()
    ids = torch.tensor([[3, 4, 5]])
    before = base(ids).logits
    model = make_tunable(base, LORA, seed=0).eval()
    assert any("c_attn" in name for name in tunable_arrays(model))
    assert torch.equal(model(ids).logits, before)
    set_arrays(model, {name: torch.full_like(values, 0.1) for name, values in tunable_arrays(model).items()})
    assert not torch.allclose(model(ids).logits, before)


def test_a_fresh_adapter_changes_nothing_and_depends_on_the_seed_alone():
    ids = torch.tensor([[3, 4, 5]])
    before = tiny_llama()(ids).logits

    def adapter(seed, global_seed):
        base = tiny_llama()
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        model = make_tunable(base, LORA, seed=seed).eval()
        assert torch.equal(torch.get_rng_state(), state), "torch's own generator must be left alone"
        assert torch.equal(model(ids).logits, before)
        return tunable_arrays(model)

    first, same, other = adapter(7, 0), adapter(7, 1), adapter(8, 0)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    "targets", ["query", "q_proj,query", "proj", "q_proj,q_pro", ",", "embed_tokens", "q_proj,norm", "self_attn"]
)
def test_targets_that_are_not_all_linear_modules_of_the_model_are_refused_with_those_that_are(targets):
    with pytest.raises(ModelError) as raised:
        make_tunable(tiny_llama(), TuningConfig(mode="lora", lora_targets=targets), seed=0)
    assert str(raised.value) == (
        f"tuning.lora-targets: lora targets must be linear modules of the small model, got {targets!r}; it has "
        "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    )


def test_a_target_may_be_given_with_the_modules_around_it():
    targets = TuningConfig(mode="lora", lora_targets="0.self_attn.q_proj")
    assert len(tunable_arrays(make_tunable(tiny_llama(), targets, seed=0))) == 2


# --- weights, in and out ---


@pytest.mark.parametrize("tuning", [TuningConfig(), LORA], ids=["full", "lora"])
def test_arrays_that_are_set_are_the_arrays_that_one_gets(tuning):
    source, target = (make_tunable(tiny_llama(seed), tuning, seed=seed) for seed in (1, 2))
    arrays = tunable_arrays(source)
    set_arrays(target, arrays)
    assert all(torch.equal(values, arrays[name]) for name, values in tunable_arrays(target).items())


def test_a_few_arrays_leave_the_others_alone():
    model = make_tunable(tiny_llama(), TuningConfig(), seed=0)
    before = tunable_arrays(model)
    set_arrays(model, {"model.norm.weight": torch.full((16,), 3.0)})
    after = tunable_arrays(model)
    assert torch.equal(after.pop("model.norm.weight"), torch.full((16,), 3.0))
    assert all(torch.equal(values, before[name]) for name, values in after.items())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (
            {"model.nothing.weight": torch.ones(2)},
            r"array model\.nothing\.weight of shape \(2,\) .* got 'no such weight'",
        ),
        ({"model.embed_tokens.weight": torch.ones(2, 16)}, rf"of shape \(2, 16\) must fit .* got \({VOCAB}, 16\)"),
        ({"lm_head.weight": torch.ones(VOCAB, 16)}, "no such weight"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_before_any_weight_is_touched(wrong, words):
    model = make_tunable(tiny_llama(), TuningConfig(), seed=0)
    before = tunable_arrays(model)
    with pytest.raises(ModelError, match=words):
        set_arrays(model, {"model.norm.weight": torch.full((16,), 3.0), **wrong})
    assert all(torch.equal(values, before[name]) for name, values in tunable_arrays(model).items())


# --- fingerprints ---


def test_the_same_model_has_the_same_fingerprint_wherever_it_was_loaded(stored):
    assert fingerprint(load_causal_lm(str(stored))) == fingerprint(tiny_llama(3)) == fingerprint(tiny_llama(3))
    assert len(fingerprint(tiny_llama(3))) == 16


def test_a_fingerprint_tells_seeds_types_shapes_and_one_changed_value_apart():
    changed = tiny_llama(3)
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    models = [
        tiny_llama(3),
        tiny_llama(4),
        tiny_llama(3).bfloat16(),
        tiny_llama(3, num_hidden_layers=1),
        tiny_llama(3, vocab=VOCAB + 1),
        tiny_gpt2(3),
        changed,
    ]
    assert len({fingerprint(model) for model in models}) == len(models)


def test_a_shape_counts_even_where_all_values_are_the_same():
    one, other = (torch.nn.Linear(*shape, bias=False) for shape in ((2, 8), (8, 2)))
    with torch.no_grad():
        one.weight.fill_(1)
        other.weight.fill_(1)
    assert fingerprint(one) != fingerprint(other)


def test_weights_that_are_put_away_take_no_memory_and_come_back_with_memory_of_their_own():
    model = tiny_llama().requires_grad_(True)
    arrays = tunable_arrays(model)
    put_away(model, arrays)
    for name, weight in model.named_parameters():
        assert weight.shape == arrays[name].shape
        assert weight.untyped_storage().nbytes() == 4
    bring_back(model, arrays)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, arrays[name])
        assert weight.data_ptr() != arrays[name].data_ptr()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(ModelError, match=r"array model.norm.weight of shape \(3,\) must fit the small model"):
        bring_back(model, {"model.norm.weight": torch.zeros(3)})


# --- adapters of other ranks, and with a frozen first matrix ---


def test_a_frozen_a_is_drawn_alike_everywhere_and_only_b_is_tuned():
    frozen = TuningConfig(mode="lora", lora_rank=2, lora_aggregation="frozen-a")
    one, two = (make_tunable(load_frozen(tiny_llama()), frozen, seed=3) for _ in range(2))
    other = make_tunable(load_frozen(tiny_llama()), frozen, seed=4)
    assert all(".lora_B." in name for name in tunable_arrays(one))
    assert len(tunable_arrays(one)) == len(tunable_arrays(make_tunable(load_frozen(tiny_llama()), LORA, seed=3))) / 2
    assert frozen_fingerprint(one) == frozen_fingerprint(two) != frozen_fingerprint(other)
    assert frozen_fingerprint(make_tunable(load_frozen(tiny_llama()), LORA, seed=3)) == ""


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_an_adapter_that_was_cut_does_what_its_first_directions_did(make):
    config = TuningConfig(mode="lora", lora_rank=3)
    whole, cut = (make_tunable(load_frozen(make()), config, seed=0) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    arrays = {name: torch.randn(part.shape, generator=generator) for name, part in tunable_arrays(whole).items()}
    first = {name: part[:2] if ".lora_A." in name else part[:, :2] for name, part in arrays.items()}
    gone = {name: part.clone() for name, part in arrays.items()}
    for name, part in gone.items():
        (part[2:] if ".lora_A." in name else part[:, 2:]).zero_()
    cut_adapter(cut, 2)
    assert {name: part.shape for name, part in tunable_arrays(cut).items()} == {
        name: part.shape for name, part in first.items()
    }
    set_arrays(cut, first)
    set_arrays(whole, gone)
    ids = torch.randint(3, 20, (2, 8), generator=generator)
    with torch.inference_mode():
        torch.testing.assert_close(cut(input_ids=ids).logits, whole(input_ids=ids).logits)
