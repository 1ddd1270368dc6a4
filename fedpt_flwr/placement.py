"""Where the weights of a large model lie, and in which form: what accelerate and transformers are told.

A model that is larger than one device is divided among several, the rest of it in the machine's memory or on disk, from
where a layer's weights come when it is their turn; quantised weights take a half or a quarter of the bytes. All of that
concerns the server's large model alone.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedpt_flwr.errors import ModelError

AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
"""Device maps that accelerate finds by itself."""

_SIZE = re.compile(r"\d+(\.\d+)? *[KMG]i?B", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """How a large model is loaded, as a run config says it; all texts, empty ones for nothing special.

    Attributes:
        device_map: One of :data:`AUTOMATIC`, or a JSON object of modules and devices: numbers of GPUs, ``cpu``,
            ``disk``.
        max_memory: A JSON object of devices and what they may take at most, such as ``{"0": "20GiB", "cpu": "60GiB"}``.
        offload_folder: Where weights are put that are to lie on disk otherwise than in the checkpoint.
        quantization: A JSON object, transformers' ``quantization_config``.
    """

    device_map: str = ""
    max_memory: str = ""
    offload_folder: str = ""
    quantization: str = ""

    @classmethod
    def from_entry(cls, entry: Mapping[str, str]) -> Placement:
        """What :meth:`to_entry` wrote; other keys are ignored."""
        return cls(**{field.name: entry.get(field.name, "") for field in dataclasses.fields(cls)})

    def to_entry(self) -> dict[str, str]:
        """All that is not empty, by name."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value}

    def elsewhere(self, device_map: str | None, max_memory: str | None, offload_folder: str | None) -> Placement:
        """The same weights on another machine: what is not None takes the place of this one's."""
        if device_map is not None and max_memory is None:
            max_memory = ""  # what the other machine's devices may take says nothing here
        given = {"device_map": device_map, "max_memory": max_memory, "offload_folder": offload_folder}
        return dataclasses.replace(self, **{name: value for name, value in given.items() if value is not None})

    def is_divided(self) -> bool:
        """Whether accelerate decides where weights lie."""
        return bool(self.device_map)

    def _package(self) -> str:
        """What a quantisation needs, as far as it is known."""
        return "bitsandbytes" if "load_in_" in self.quantization else "it"

    def check_package(self) -> None:
        """Make sure that the package is here that a quantisation needs, where it is known.

        Raises:
            ModelError: It is not.
        """
        if self._package() == "bitsandbytes" and find_spec("bitsandbytes") is None:
            raise self.lacks_package("No module named 'bitsandbytes'")

    def lacks_package(self, reason: str) -> ModelError:
        """The error for a package that is not there."""
        return ModelError(
            f"a package that this quantisation needs is not there ({reason})",
            value=self.quantization,
            place="model.large-quantization",
            remedy=f"install {self._package()} where the large model is loaded, or leave the key empty in a new run",
        )

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of transformers' ``from_pretrained``.

        Raises:
            ModelError: A value cannot be read, or two contradict each other.
        """
        if self.max_memory and self.device_map not in AUTOMATIC:
            raise ModelError(
                "a bound on memory needs a device map that is found automatically",
                value=self.max_memory,
                place="model.large-max-memory",
                remedy="set model.large-device-map='auto'",
            )
        found: dict[str, Any] = {}
        if self.device_map:
            found["device_map"] = self.device_map if self.device_map in AUTOMATIC else self._devices()
        if self.max_memory:
            found["max_memory"] = self._limits()
        if self.offload_folder:
            folder = Path(self.offload_folder)
            if folder.exists() and not folder.is_dir():
                raise ModelError("must be a folder", value=str(folder), place="model.large-offload-folder")
            found["offload_folder"] = str(folder)
        if self.quantization:
            found["quantization_config"] = json_object(self.quantization, place="model.large-quantization")
        return found

    def _limits(self) -> dict[int | str, int | str]:
        place = "model.large-max-memory"
        limits = {_number(device): limit for device, limit in json_object(self.max_memory, place=place).items()}
        for device, limit in limits.items():
            is_size = (type(limit) is int and limit >= 0) or (
                isinstance(limit, str) and _SIZE.fullmatch(limit) is not None
            )
            if not is_size or (isinstance(device, str) and device not in ("cpu", "disk", "mps")):
                raise ModelError(
                    "a bound on memory gives a device (the number of a GPU, cpu) its bytes, or a size such as 20GiB",
                    value={device: limit},
                    place=place,
                )
        return limits

    def _devices(self) -> dict[str, int | str]:
        place = "model.large-device-map"
        devices = {name: _number(device) for name, device in json_object(self.device_map, place=place).items()}
        for name, device in devices.items():
            if isinstance(device, bool) or not isinstance(device, int | str):
                raise ModelError(
                    "a device map gives each module a device: the number of a GPU, cpu or disk",
                    value={name: device},
                    place=place,
                )
        return devices


def json_object(text: str, *, place: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ModelError: The text is none.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        found, reason = None, f" ({error})"
    else:
        reason = ""
    if not isinstance(found, dict) or not found:
        raise ModelError(f"must be a JSON object{reason}", value=text, place=place)
    return found


def _number(device: Any) -> Any:
    """Numbers of GPUs as numbers: keys of a JSON object are texts."""
    return int(device) if isinstance(device, str) and device.isdecimal() else device
