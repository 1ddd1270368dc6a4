"""Which prompt ``fedpt generate`` sends: one that is typed may be written in short, one from data is taken as it is."""

import pytest
from test_versions import make_run
from typer.testing import CliRunner

from fedpt_flwr import cli
from fedpt_flwr.cli import answering
from fedpt_flwr.service import client


class Asked(Exception):
    """Raised with the prompt, in place of an answer."""


@pytest.fixture
def prompt_of(tmp_path, monkeypatch):
    """The prompt that some options lead to, here or at a service; the first test item's is given."""
    run = make_run(tmp_path)

    def ask(item, *options, at_service, given=None):
        def asked(text, *_others):
            raise Asked(text["prompt"] if at_service else text)

        class Service:
            def __init__(self, *_about):
                pass

            def info(self):
                return {"max_tokens": 4, "examples": [{"prompt": item, "answer": "right"}]}

            def stream(self, body):
                asked(body)

            def close(self):
                pass

        monkeypatch.setattr(answering, "_test_item", lambda *_: (item, "right"))
        monkeypatch.setattr(answering, "_prompt_ids", asked)
        monkeypatch.setattr(client, "ServiceClient", Service)
        where = ["--url", "http://here"] if at_service else ["--run", str(run)]
        with pytest.raises(Asked) as found:
            CliRunner().invoke(cli.app, ["generate", *options, *where], input=given, catch_exceptions=False)
        return found.value.args[0]

    return ask


@pytest.mark.parametrize("at_service", [False, True], ids=["here", "at a service"])
@pytest.mark.parametrize("item", [r"What is \nu in \nabla?", "-"])
def test_a_prompt_from_data_is_taken_as_it_is(prompt_of, item, at_service):
    assert prompt_of(item, "--example", "1", at_service=at_service, given="something else") == item


@pytest.mark.parametrize("at_service", [False, True], ids=["here", "at a service"])
def test_a_typed_prompt_may_be_written_in_short(prompt_of, at_service):
    assert prompt_of("", r"one\ntwo", at_service=at_service) == "one\ntwo"
    assert prompt_of("", "-", at_service=at_service, given="one\\ntwo\n") == "one\\ntwo\n"
