"""Large models that are divided, offloaded and quantised, by the real accelerate."""

import json
import re
from importlib.util import find_spec

import pytest
import torch
from federation import federate
from tiny import EOS, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from fedpt_flwr.config import parse_run_config
from fedpt_flwr.errors import ConfigError, ModelError
from fedpt_flwr.models import fingerprint, input_device, load_causal_lm
from fedpt_flwr.placement import Placement
from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.runs import read_json

IDS = torch.tensor([[5, 9, 12, 30, 7]])
LAYERS_ON_DISK = json.dumps({"model.embed_tokens": "cpu", "model.layers": "disk", "": "cpu"})
PLACEMENTS = {
    "one device": Placement(device_map=json.dumps({"": "cpu"})),
    "layers on disk": Placement(device_map=LAYERS_ON_DISK),
    "found automatically": Placement(device_map="auto", max_memory=json.dumps({"cpu": 12_000})),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A large and a small model, the large one in several shards."""
    root = tmp_path_factory.mktemp("models")
    tiny_llama(1, tie_word_embeddings=False, num_hidden_layers=3).save_pretrained(root / "large", max_shard_size=9_000)
    tiny_llama(2).save_pretrained(root / "small")
    for name in ("large", "small"):
        tiny_tokenizer().save_pretrained(root / name)
    assert len(list((root / "large").glob("*.safetensors"))) > 2
    return root


def proxy_with(large, folder):
    tuned = tiny_llama(3)
    return ProxyModel(large, tuned, load_causal_lm(str(folder / "small")))


# --- what is loaded ---


@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_divided_model_is_the_same_model(folder, name):
    plain = load_causal_lm(str(folder / "large"))
    large = load_causal_lm(str(folder / "large"), placement=PLACEMENTS[name])
    on_disk = sum(weight.is_meta for weight in large.parameters())
    assert on_disk > 0 if name != "one device" else on_disk == 0
    assert fingerprint(large) == fingerprint(plain)
    assert input_device(large) == torch.device("cpu")
    assert torch.equal(large(IDS).logits, plain(IDS).logits)
    proxy, expected = proxy_with(large, folder), proxy_with(plain, folder)
    assert proxy.device == torch.device("cpu")
    batch = torch.cat([IDS, IDS.flip(1)])
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    for drafts in (None, 0, 3):
        settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "draft_tokens": drafts}
        assert torch.equal(proxy.generate(batch, **settings), expected.generate(batch, **settings))
    assert torch.equal(proxy.prepare()(input_ids=IDS).logits.argmax(-1), expected(input_ids=IDS).logits.argmax(-1))


@pytest.mark.parametrize(
    "devices",
    [
        {"model.layers.0": "disk", "": "cpu"},
        {"model.embed_tokens": "disk", "": "cpu"},
        {"model": "cpu"},
        {"model": "cpu", "lm_head": "disk"},
    ],
    ids=str,
)
def test_a_map_places_tied_embeddings_once(tmp_path, devices):
    plain = tiny_llama(1, num_hidden_layers=3)
    plain.save_pretrained(tmp_path)
    large = load_causal_lm(str(tmp_path), placement=Placement(device_map=json.dumps(devices)))
    places = getattr(large, "hf_device_map", {})  # none where all is on one device
    assert places.get("lm_head") == places.get("model.embed_tokens")
    assert torch.equal(large(IDS).logits, plain(IDS).logits)


def test_a_proxy_folder_remembers_how_its_large_model_is_loaded(folder, tmp_path):
    placement = PLACEMENTS["found automatically"]
    proxy = proxy_with(load_causal_lm(str(folder / "large"), placement=placement), folder)
    proxy.config.large = placement.to_entry()
    refs = {"large_ref": str(folder / "large"), "untuned_ref": str(folder / "small")}
    proxy.save_pretrained(tmp_path / "proxy", **refs)
    again = ProxyModel.from_pretrained(tmp_path / "proxy")
    assert any(weight.is_meta for weight in again.large.parameters())
    assert torch.equal(again(input_ids=IDS).logits, proxy(input_ids=IDS).logits)
    again.save_pretrained(tmp_path / "twice")
    assert Placement.from_entry(read_json(tmp_path / "twice" / "config.json")["large"]) == placement

    whole = ProxyModel.from_pretrained(tmp_path / "proxy", large_device_map="")
    assert not any(weight.is_meta for weight in whole.large.parameters())
    assert ProxyModel.from_pretrained(tmp_path / "proxy", like=again).large is again.large
    with pytest.raises(ModelError, match="whose large model is divided or quantised cannot be converted"):
        ProxyModel.from_pretrained(tmp_path / "proxy", dtype="bfloat16")


def test_a_federation_loads_its_large_model_once_divided_and_never_on_a_device(folder, tmp_path, monkeypatch):
    loaded = []
    plainly = AutoModelForCausalLM.from_pretrained.__func__

    def counting(cls, source, *args, **kwargs):
        loaded.append((str(source).rsplit("/", 1)[-1], "device_map" in kwargs))
        return plainly(cls, source, *args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", classmethod(counting))
    data = tmp_path / "data.jsonl"
    rows = [{"request": f"{n} + 1", "unit": "a", "answer": str(n + 1), "kind": "ab"[n % 2]} for n in range(40)]
    data.write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "model.small": str(folder / "small"),
        "model.large": str(folder / "large"),
        "model.large-device-map": "auto",
        "model.large-max-memory": json.dumps({"cpu": 12_000}),
        "train.max-length": 32,
        "num-server-rounds": 1,
        "data.train": str(data),
        "data.template": ">{request}\n",
        **dict.fromkeys(("data.validation", "data.test", "data.public", "data.prompts"), ""),
        "distillation.mode": "off",
        "scoring.few-shot": 0,
    }
    run = federate(tmp_path / "runs", num_devices=2, run_config=settings)
    assert loaded.count(("large", True)) == 1
    assert ("large", False) not in loaded
    assert read_json(run / "results.json")["rows"]["proxy"]["loss"] > 0
    loaded_again = ProxyModel.from_pretrained(run)
    assert any(weight.is_meta for weight in loaded_again.large.parameters())
    assert loaded_again.generation_config.eos_token_id == EOS


# --- refusals ---


@pytest.mark.parametrize(
    ("placement", "said"),
    [
        (
            Placement(device_map='{"model.layers": "cpu"}'),
            r"model\.large-device-map: a device map must place all weights; 3 are left out, the first "
            r"model\.embed_tokens\.weight, got .*; name its module too, or set auto",
        ),
        (
            Placement(device_map='{"": "cpu", "model.layer.0": "cpu"}'),
            r"model\.large-device-map: a device map must name modules of the large model, got 'model\.layer\.0'",
        ),
        (
            Placement(device_map='{"": 7}'),
            r"model\.large-device-map: this process sees 0 CUDA devices, got 7; name devices of this machine",
        ),
        (
            Placement(device_map='{"": [1]}'),
            r"model\.large-device-map: a device map gives each module a device: the number of a GPU, cpu or disk, got",
        ),
        (Placement(device_map='{"a":' * 100_000), r"model\.large-device-map: must be a JSON object"),
        (Placement(device_map="cpu, disk"), r"model\.large-device-map: must be a JSON object \(Expecting value"),
        (
            Placement(max_memory='{"cpu": "1GiB"}'),
            r"model\.large-max-memory: a bound on memory needs a device map that is found automatically, got .*; set "
            r"model\.large-device-map='auto'",
        ),
        (
            Placement(device_map="auto", max_memory='{"cpu": "much"}'),
            r"model\.large-max-memory: a bound on memory gives a device .* its bytes, or a size such as 20GiB, got "
            r"\{'cpu': 'much'\}",
        ),
        (
            Placement(quantization='{"bits": 4}'),
            r"the model cannot be loaded in this way \(ValueError: .*quant.*; change model\.large-quantization",
        ),
        pytest.param(
            Placement(quantization='{"load_in_8bit": true}'),
            r"model\.large-quantization: a package that this quantisation needs is not there \(.*bitsandbytes.*\), got "
            r".*; install bitsandbytes where the large model is loaded, or leave the key empty in a new run",
            marks=pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is there"),
        ),
    ],
)
def test_what_cannot_be_placed_is_said_in_one_sentence(folder, monkeypatch, placement, said):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ModelError) as raised:
        load_causal_lm(str(folder / "large"), placement=placement)
    assert re.search(said, str(raised.value)), str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_8_bit_model_does_not_say_at_every_layer_to_what_its_inputs_are_cast(folder, caplog):
    pytest.importorskip("bitsandbytes")
    model = load_causal_lm(str(folder / "large"), placement=Placement(quantization='{"load_in_8bit": true}'))
    model(IDS)
    assert "MatMul8bitLt" not in caplog.text


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("device-map", "gpu", "must be empty, auto, balanced, balanced_low_0, sequential or a JSON object, got 'gpu'"),
        ("max-memory", "20GiB", "must be empty or a JSON object, got '20GiB'"),
        ("quantization", "[4]", "must be empty or a JSON object, got '[4]'"),
        ("offload-folder", "../here", "must be an absolute path"),
    ],
)
def test_values_that_are_none_are_refused_before_a_run(key, value, said):
    with pytest.raises(ConfigError, match=re.escape(f"model.large-{key}: {said}")):
        parse_run_config({f"model.large-{key}": value})


# --- quantised ---


@pytest.mark.slow
@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("how", ["load_in_8bit", "load_in_4bit"])
def test_a_quantised_large_model_loads_scores_and_comes_back(tmp_path, how):
    tiny_llama(1, hidden_size=64, intermediate_size=128, num_attention_heads=4).save_pretrained(tmp_path / "large")
    tiny_llama(2).save_pretrained(tmp_path / "small")
    placement = Placement(quantization=json.dumps({how: True}))
    plain = load_causal_lm(str(tmp_path / "large"))
    large = load_causal_lm(str(tmp_path / "large"), placement=placement)
    assert large.get_memory_footprint() < plain.get_memory_footprint()
    torch.testing.assert_close(large(IDS).logits, plain(IDS).logits, rtol=0, atol=0.5 * float(plain(IDS).logits.std()))
    proxy = proxy_with(large, tmp_path)
    proxy.config.large = placement.to_entry()
    refs = {"large_ref": str(tmp_path / "large"), "untuned_ref": str(tmp_path / "small")}
    proxy.save_pretrained(tmp_path / "proxy", **refs)
    again = ProxyModel.from_pretrained(tmp_path / "proxy")
    texts = [
        one.generate(IDS, max_new_tokens=6, do_sample=False, draft_tokens=drafts).tolist()
        for one in (proxy, again)
        for drafts in (None, 2)
    ]
    assert texts == [texts[0]] * 4
