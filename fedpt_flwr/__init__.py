"""Federated proxy-tuning on Flower: devices tune a small LM, and it steers a frozen large one at decoding time.

    from fedpt_flwr import ProxyModel

    model = ProxyModel.from_pretrained("runs/latest")
    model.generate(...)

Names are imported when they are first used, so ``import fedpt_flwr`` alone costs nothing and loads no torch. For
``AutoModelForCausalLM.from_pretrained`` to know proxies, import ``ProxyModel`` once: that registers it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedpt_flwr.logits import combine_logits
    from fedpt_flwr.proxy import ProxyModel
    from fedpt_flwr.strategy import FedPT

__version__ = "0.1.0"

__all__ = ["FedPT", "ProxyModel", "__version__", "combine_logits"]

_HOMES = {
    "FedPT": "fedpt_flwr.strategy",
    "ProxyModel": "fedpt_flwr.proxy",
    "combine_logits": "fedpt_flwr.logits",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
