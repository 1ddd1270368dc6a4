"""Text for pre-training, and pairs of models made of it."""

import json
import tomllib
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from fedpt_flwr import cli
from fedpt_flwr import pair as pair_module
from fedpt_flwr.corpus import Source, hold_out, read_documents, repeated, repetitions, token_stream, train_tokenizer
from fedpt_flwr.errors import ConfigError, DataError, FedPTError, RunError
from fedpt_flwr.pair import RECIPES, PairRecipe, loss_curve, make_pair
from fedpt_flwr.pretrain import LlamaShape, PretrainConfig, make_llama, pretrain, stream_loss
from fedpt_flwr.vocabulary import match_vocabularies

TINY = LlamaShape(hidden_size=8, num_layers=1, num_heads=2)


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder of text files, and a data file beside it."""
    root = tmp_path_factory.mktemp("texts")
    files = {
        "lib/a.py": "def a(): pass\n",
        "lib/deep/b.md": "# Title\n\nSome words about b.\n",
        "lib/deep/twin.py": "def a(): pass\n",
        "lib/image.png": "no text",
        "lib/tests/t.py": "assert 1",
        "lib/__pycache__/c.py": "never",
        "lib/.hidden.py": "never",
        "lib/blank.txt": " \n",
        "data.jsonl": "".join(
            json.dumps({"question": f"What is {n}?", "answer": f"{n} is {n * n}."}) + "\n" for n in range(60)
        ),
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "lib" / "latin.txt").write_bytes(b"caf\xe9")
    return root


def test_a_folder_gives_its_text_files_each_text_once(texts):
    documents = read_documents(Source.parse(str(texts / "lib")), exclude=["tests", "x*"])
    assert documents == ["def a(): pass", "# Title\n\nSome words about b."]


def test_records_are_written_by_the_template_behind_the_path(texts):
    documents = read_documents(Source.parse(f"{texts}/data.jsonl::{{question}}\\nA: {{answer}}"))
    assert documents[2] == "What is 2?\nA: 2 is 4."
    assert len(documents) == 60


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("{}/nope", "there is no such file or folder"),
        ("{}/" + 300 * "a", "there is no such file or folder"),
        ("~nosuchuser/texts", "there is no such file or folder"),
        ("{}/data.jsonl", "record 1: the record has no field 'text'"),
        ("{}/lib::{{x}}", "a template is for the records of a data file"),
        ("{}/lib/latin.txt", "the text must be UTF-8"),
        ("{}/lib/blank.txt", "no text was found"),
        ("{}/lib/image.png", "a data file must end in"),
    ],
)
def test_what_is_no_text_is_said(texts, source, match):
    with pytest.raises(DataError, match=match):
        read_documents(Source.parse(source.format(texts)))


def test_held_out_documents_are_a_hundredth_and_not_trained_on():
    documents = [f"{number:03} " + "x" * 96 for number in range(400)]
    kept, held_out = hold_out(documents, seed=0)
    assert len(held_out) == 4
    assert sorted(kept + held_out) == documents
    assert kept != sorted(kept)
    assert hold_out(documents, seed=0) == (kept, held_out)
    assert hold_out(["alone"], seed=0) == (["alone"], [])


def test_a_small_text_is_read_more_often_than_its_size_says():
    assert repetitions([100, 1], balance=1.0) == [1, 1]
    assert repetitions([100, 1], balance=0.0) == [1, 100]  # as much of the one as of the other
    assert repetitions([100, 1], balance=0.5) == [1, 10]


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("plain", "a template must have a field of the records in braces, got 'plain'"),
        ("{question", "the template cannot be read"),
    ],
)
def test_a_template_without_a_field_is_refused_before_anything_is_read(template, match):
    with pytest.raises(DataError, match=match):
        Source.parse(f"/nowhere.jsonl::{template}")


def test_a_stream_is_repeated_as_a_whole_and_then_in_part():
    assert repeated(torch.arange(4), 2.5).tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]


# --- the loop ---------------------------------------------------------------------------------------------------------

TRAINING = PretrainConfig(steps=9, batch_size=2, window=8, learning_rate=1e-2, warmup_steps=2)
STREAM = torch.randint(32, (500,), generator=torch.Generator().manual_seed(0))


def tiny_model(seed=0, shape=TINY):
    return make_llama(shape, vocab_size=32, bos_token_id=0, eos_token_id=0, pad_token_id=1, seed=seed)


class Ended(Exception):
    pass


def end_at(step):
    def progress(done, _loss):
        if done == step:
            raise Ended

    return progress


def test_a_training_that_was_ended_goes_on_to_the_same_bits(tmp_path):
    whole, checkpoint = tiny_model(), tmp_path / "checkpoint"
    losses = pretrain(whole, STREAM, TRAINING)
    for step in (5, 7):  # ended twice, once between two checkpoints
        with pytest.raises(Ended):
            pretrain(tiny_model(), STREAM, TRAINING, progress=end_at(step), checkpoint=checkpoint, checkpoint_every=2)
    steps = []
    resumed = tiny_model(seed=1)  # whose own weights play no part
    again = pretrain(
        resumed,
        STREAM,
        TRAINING,
        progress=lambda done, _: steps.append(done),
        checkpoint=checkpoint,
        checkpoint_every=2,
    )
    assert steps == [7, 8, 9]
    assert again == losses
    for (name, one), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_a_checkpoint_of_another_training_or_a_damaged_one_is_refused(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    pretrain(tiny_model(), STREAM, TRAINING, checkpoint=checkpoint)
    for model, training in (
        (tiny_model(), replace(TRAINING, steps=10)),
        (tiny_model(shape=replace(TINY, num_layers=2)), TRAINING),
    ):
        with pytest.raises(RunError, match="checkpoint: the checkpoint is of another training"):
            pretrain(model, STREAM, training, checkpoint=checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    with pytest.raises(RunError, match="the checkpoint cannot be read .*; remove it to begin anew"):
        pretrain(tiny_model(), STREAM, TRAINING, checkpoint=checkpoint)


@pytest.mark.parametrize("length", [2, 8, 9, 10, 33, 40])
def test_the_loss_of_a_stream_counts_every_token_but_the_first_once(length):
    model, tokens = tiny_model(), STREAM[:length]
    nats = []
    for begin in range(0, length - 1, 8):
        window = tokens[begin : begin + 9]
        scores = model(window[None, :-1]).logits[0].log_softmax(-1)
        nats += [-scores[place, token].item() for place, token in enumerate(window[1:])]
    assert len(nats) == length - 1
    assert stream_loss(model, tokens, window=8, batch_size=2) == pytest.approx(sum(nats) / len(nats), rel=1e-5)


def test_a_loss_curve_is_the_mean_of_stretches():
    assert loss_curve([3.0, 1.0]) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 1.0}]
    curve = loss_curve([float(step) for step in range(250)])
    assert curve[0] == {"step": 3, "loss": 1.0}
    assert curve[-1] == {"step": 250, "loss": 249.0}
    assert len(curve) == 84


# --- a pair -----------------------------------------------------------------------------------------------------------

RECIPE = PairRecipe(
    small=TINY,
    large=replace(TINY, hidden_size=16),
    vocab_size=300,
    window=16,
    batch_size=2,
    num_tokens=16 * 2 * 6,
)


def sources(texts):
    return [Source.parse(f"{texts}/lib"), Source.parse(f"{texts}/data.jsonl::{{question}}\n{{answer}}")]


@pytest.fixture(scope="module")
def pair(texts, tmp_path_factory):
    """A pair whose making was ended in the middle of the large model."""
    out = tmp_path_factory.mktemp("pairs") / "pair"

    def end(what, done, _total, _loss):
        if what == "pre-training the large model" and done == 4:
            raise Ended

    with pytest.raises(Ended):
        make_pair(out, sources(texts), RECIPE, progress=end)
    assert not out.exists()
    seen = []
    make_pair(out, sources(texts), RECIPE, progress=lambda what, done, total, _: seen.append((what, done, total)))
    assert ("pre-training the small model", 6, 6) not in seen, "it was made before"
    assert ("pre-training the large model", 5, 6) in seen
    assert ("pre-training the large model", 4, 6) not in seen
    return out


def test_a_pair_that_was_ended_is_the_one_that_was_not(pair, texts, tmp_path):
    make_pair(tmp_path / "pair", sources(texts), RECIPE)
    for name in ("small", "large"):
        one, other = (load_file(folder / name / "model.safetensors") for folder in (pair, tmp_path / "pair"))
        assert all(torch.equal(one[key], other[key]) for key in one.keys() | other.keys())
    described = [json.loads((folder / "pretrain.json").read_text()) for folder in (pair, tmp_path / "pair")]
    assert described[0] == described[1]


def test_a_pair_is_two_models_of_one_vocabulary_as_the_hub_has_them(pair):
    assert {path.name for path in pair.iterdir()} == {"small", "large", "pretrain.json", "run-config.toml"}
    assert [path.name for path in pair.parent.iterdir()] == ["pair"], "nothing is left of the work"
    keys = tomllib.loads((pair / "run-config.toml").read_text())
    assert keys == {f"model.{name}": str(pair / name) for name in ("small", "large")}
    tokenizers = []
    for name, width in (("small", 8), ("large", 16)):
        model = AutoModelForCausalLM.from_pretrained(pair / name)
        tokenizers.append(AutoTokenizer.from_pretrained(pair / name))
        assert (model.config.hidden_size, model.dtype) == (width, torch.float32)
    match_vocabularies(*tokenizers)


def test_a_pair_says_what_it_was_made_of_and_how_good_it_is(pair):
    described = json.loads((pair / "pretrain.json").read_text())
    shares = [row["share_of_tokens"] for row in described["sources"]]
    assert sum(shares) == pytest.approx(1, abs=1e-3)
    # The data file has 60 * 21 characters and more, the folder about fifty: by their roots, not 25 to 1.
    assert described["sources"][0]["repetitions"] > 3
    assert described["sources"][1]["repetitions"] == 1
    for model in described["models"].values():
        assert [point["step"] for point in model["loss_curve"]] == [1, 2, 3, 4, 5, 6]
        assert model["held_out"][1]["bits_per_byte"] > 0
    assert described["models"]["large"]["parameters"] > described["models"]["small"]["parameters"]
    rates = {name: model["training"]["learning_rate"] for name, model in described["models"].items()}
    assert rates["small"] == pytest.approx(rates["large"] * 2**0.5)


def test_an_unfinished_pair_with_other_options_is_refused(texts, tmp_path):
    def end(what, *_):
        if "small" in what:
            raise Ended

    out = tmp_path / "pair"
    with pytest.raises(Ended):
        make_pair(out, sources(texts), RECIPE, progress=end)
    with pytest.raises(ConfigError, match="begun with another recipe or other text, got 'num_tokens, seed, the text'"):
        make_pair(out, sources(texts)[1:], replace(RECIPE, num_tokens=99, seed=1))


def test_where_no_step_was_taken_nothing_is_left(texts, tmp_path):
    (tmp_path / "tiny.txt").write_text("too few")
    out = tmp_path / "pair"
    with pytest.raises(
        DataError, match=r"the texts come to \d tokens, and must come to more than a window of 16; give"
    ):
        make_pair(out, [Source.parse(f"{tmp_path}/tiny.txt")], RECIPE)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.txt"]
    make_pair(out, sources(texts), RECIPE)


def test_a_folder_that_holds_something_is_left_alone(texts, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="a pair needs a new or an empty folder"):
        make_pair(tmp_path, sources(texts), RECIPE)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"vocab_size": 100}, "--vocab-size: must be at least 258"),
        ({"window": 1024}, "--window: must not exceed what the models can read"),
        ({"num_tokens": 0}, "--tokens: must be at least 1"),
        ({"learning_rate": 0.0}, "--learning-rate: must be a finite number above 0"),
        ({"learning_rate": float("nan")}, "--learning-rate: must be a finite number above 0"),
        ({"balance": 1.5}, "--balance: must be from 0 to 1"),
        ({"small": replace(TINY, hidden_size=32)}, "--small and --large: the small model must not have more weights"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(changes, match):
    with pytest.raises(ConfigError, match=match):
        replace(RECIPE, **changes)


def test_the_recipes_have_a_large_model_at_least_six_times_the_small_one():
    for recipe in RECIPES.values():
        sizes = [12 * shape.num_layers * shape.hidden_size**2 for shape in (recipe.small, recipe.large)]
        assert sizes[1] > 6 * sizes[0]


def test_the_command_makes_a_pair_and_says_how_good_it_is(texts, tmp_path):
    out = tmp_path / "pair"
    arguments = ["pretrain", "--text", f"{texts}/lib", "--text", f"{texts}/data.jsonl::{{question}}\\n{{answer}}"]
    arguments += ["--small", "8x1x2", "--large", "16x1x2", "--vocab-size", "300", "--window", "16"]
    arguments += ["--tokens", "0.0001", "--threads", "1", "--device", "cpu", "--out", str(out)]
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "large: " in result.output
    assert "bits per byte of held-out text" in result.output
    assert "pre-training the large model: 1/1" in result.stderr
    assert (out / "run-config.toml").is_file()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--small", "64x3"], "--small: must be WIDTHxLAYERSxHEADS, got '64x3'; such as 64x3x2"),
        (["--large", "9x1x2"], r"--large: the width .* even multiple of its number of heads, got \(9, 2\)"),
        (["--tokens", "nan"], "--tokens: must be a finite number of millions, at least 0.000001, got nan"),
        (["--tokens", "inf"], "--tokens: must be a finite number of millions, at least 0.000001, got inf"),
        (["--tokens", "0"], "--tokens: must be a finite number of millions, at least 0.000001, got 0.0"),
        (["--text", "P::{question"], "--text: the template cannot be read"),
        (["--recipe", "huge"], "--recipe: must be one of quick, standard, gpu"),
    ],
)
def test_the_command_refuses_what_it_does_not_understand(options, match, texts, tmp_path):
    arguments = ["pretrain", "--text", str(texts / "lib"), "--out", str(tmp_path / "pair"), *options]
    with pytest.raises(FedPTError, match=match):
        CliRunner().invoke(cli.app, arguments, catch_exceptions=False)


def test_the_command_refuses_more_threads_than_a_process_can_have(texts, tmp_path):
    arguments = ["pretrain", "--text", str(texts / "lib"), "--out", str(tmp_path / "pair"), "--threads", "100000"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 2
    assert "--threads" in result.output


def test_a_text_that_is_named_twice_is_one_text(texts, tmp_path, monkeypatch):
    seen = []

    def make(_out, sources, *_, **__):
        seen.extend(sources)
        raise Ended

    monkeypatch.setattr(pair_module, "make_pair", make)
    source = f"{texts}/data.jsonl::{{question}}"
    arguments = ["pretrain", "--text", source, "--text", f"{texts}/lib", "--text", source, "--out", str(tmp_path)]
    with pytest.raises(Ended):
        CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert seen == [Source.parse(source), Source.parse(f"{texts}/lib")]


def test_the_tokens_of_a_stream_are_its_documents_after_an_end_each():
    tokenizer = train_tokenizer(["some words", "other words"], vocab_size=280, max_length=64)
    tokens = token_stream(tokenizer, ["some words", "words"])
    assert tokenizer.decode(tokens) == "<eos>some words<eos>words"
    assert token_stream(tokenizer, []).tolist() == []
