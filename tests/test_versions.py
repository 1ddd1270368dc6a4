"""How versions of runs are loaded and newer ones noticed, on runs of tiny models."""

import os

import pytest
from fake_endpoint import fake_remote
from test_vocabulary import letters
from tiny import LETTERS, tiny_llama, tiny_tokenizer

from fedpt_flwr.cli.loading import open_run
from fedpt_flwr.config import flat_values, parse_run_config
from fedpt_flwr.errors import ModelError, RunError, VocabularyMismatch
from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.proxy_folder import BUNDLED
from fedpt_flwr.runs import recorded_config, replace_link, write_json
from fedpt_flwr.service.versions import Loader, Watcher


def make_run(root, name="20260101T000000Z-1", *, rounds=1, tokenizer=None, **run_config):
    """A run that has completed so many rounds, of which the first is linked; the large model is beside it."""
    run, large = root / name, tiny_llama(1)
    if not (root / "large").is_dir():
        large.save_pretrained(root / "large")
    for number in range(1, rounds + 1):
        ProxyModel(large, tiny_llama(10 + number), tiny_llama(3)).save_pretrained(
            run / "rounds" / f"{number:04d}" / "proxy",
            large_ref=str(root / "large"),
            untuned_ref=BUNDLED,
            tokenizer=tokenizer or tiny_tokenizer(),
        )
    replace_link(run / "proxy", "rounds/0001/proxy")
    write_json(run / "config.json", {"run_config": flat_values(parse_run_config(run_config))})
    return run


def watcher_of(loader, run, served, **settings):
    """A watcher that is only looked with; the versions that it finds, and what it says of those that it does not."""
    found, failures = [], []
    watcher = Watcher(
        loader,
        run,
        served=served.mark,
        **{"follow": False, "poll_s": 1.0, "on_version": found.append, "on_failure": failures.append} | settings,
    )
    return watcher, found, failures


def test_a_round_that_completes_while_the_models_load_is_noticed(tmp_path, monkeypatch):
    run, loader = make_run(tmp_path, rounds=2), Loader()
    load = ProxyModel.from_pretrained

    def slowly(*args, **settings):
        proxy = load(*args, **settings)
        replace_link(run / "proxy", "rounds/0002/proxy")
        return proxy

    with monkeypatch.context() as patched:
        patched.setattr(ProxyModel, "from_pretrained", slowly)
        first = loader.load(run)
    watcher, found, _ = watcher_of(loader, run, first)
    watcher.look()
    watcher.look()
    assert (first.server_round, [version.server_round for version in found]) == (1, [2])


def test_a_proxy_without_its_config_is_no_proxy(tmp_path):
    run = make_run(tmp_path, rounds=1)
    (run / "rounds" / "0001" / "proxy" / "config.json").unlink()
    with pytest.raises(RunError, match="a proxy must have a config.json that can be read"):
        Loader().load(run)


def shuffled_tokenizer():
    """The tiny one's tokens under other ids."""
    return letters(LETTERS[::-1])


def test_a_run_of_another_vocabulary_does_not_follow_at_one_remote_model(tmp_path):
    one = make_run(tmp_path)
    other = make_run(tmp_path, "20260102T000000Z-2", tokenizer=shuffled_tokenizer())
    loader = Loader(large=fake_remote())
    loader.load(one)
    with pytest.raises(
        VocabularyMismatch, match=r"20260102T000000Z-2: .* with another vocabulary .*; serve this run by"
    ):
        loader.load(other)


def test_a_followed_run_of_another_vocabulary_connects_to_its_service_anew(tmp_path, monkeypatch):
    address = {"model.large-url": "http://fake"}
    one = make_run(tmp_path, **address)
    other = make_run(tmp_path, "20260102T000000Z-2", tokenizer=shuffled_tokenizer(), **address)
    connected = []

    def connect(_config, tokenizer):
        connected.append(tokenizer)
        return fake_remote(tokenizer=tokenizer)

    monkeypatch.setattr("fedpt_flwr.service.versions.remote_large", connect)
    loader = Loader()
    first, again, second = (loader.load(run) for run in (one, one, other))
    assert again.proxy.large is first.proxy.large
    assert second.proxy.large.endpoint.vocabulary == second.vocabulary != first.vocabulary
    assert len(connected) == 2


def test_a_version_that_cannot_be_loaded_is_tried_ever_more_seldom_and_another_one_at_once(tmp_path):
    run = make_run(tmp_path, rounds=2)
    loader, tried = Loader(), []
    watcher, found, _ = watcher_of(loader, run, loader.load(run), poll_s=10.0)
    weights = run / "rounds/0002/proxy/tuned/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-9])
    replace_link(run / "proxy", "rounds/0002/proxy")
    for number in range(20):
        try:
            watcher.look()
        except ModelError:
            tried.append(number)
    assert tried == [0, 2, 6, 12, 18]  # six looks are a minute
    weights.write_bytes(whole)
    config = run / "rounds/0002/proxy/config.json"
    os.utime(config, ns=(0, 0))  # as a round that is written again
    watcher.look()
    assert [version.server_round for version in found] == [2]


def test_a_folder_without_a_recorded_config_is_no_run(tmp_path):
    run = make_run(tmp_path)
    assert recorded_config(run).seed == 0
    write_json(run / "config.json", {"run_config": []})
    for ask in (Loader().load, lambda folder: open_run(str(folder))):
        with pytest.raises(RunError, match=r"config\.json: must hold a run's config; name the run's own folder"):
            ask(run)
