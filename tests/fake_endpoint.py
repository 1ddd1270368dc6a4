"""An endpoint without a connection: a tiny model here answers what a service would, all log-probabilities."""

import torch
from tiny import tiny_llama, tiny_tokenizer

from fedpt_flwr.config import RemoteConfig
from fedpt_flwr.endpoint import Endpoint
from fedpt_flwr.remote import RemoteModel


class FakeEndpoint(Endpoint):
    """Answers by itself; nothing is kept or paid.

    Args:
        context: The longest text that it takes.
        tokenizer: Of the small models.
        model: Answers; None: the large one of the tests of remote models.
        config: How to ask.

    Attributes:
        asked: The texts that it was asked about and the first place of each, as they came.
    """

    def __init__(self, *, context=None, tokenizer=None, model=None, **config):
        self.asked = []
        self._answering = model or tiny_llama(1)
        self._says = context
        super().__init__("http://fake", tokenizer or tiny_tokenizer(), RemoteConfig(**{"retries": 0} | config))

    def _open(self):
        self.context = self._says
        return "fake"

    def _ask_full(self, text, first):
        self.asked.append((text, first))
        with torch.inference_mode():
            rows = self._answering(torch.tensor([text])).logits[0].log_softmax(-1)
        return {text[: place + 1]: rows[place].clone() for place in range(first, len(text))}


def fake_remote(**settings):
    """A remote model that such an endpoint answers for."""
    endpoint = FakeEndpoint(**settings)
    return RemoteModel(endpoint, endpoint._tokenizer).eval()
