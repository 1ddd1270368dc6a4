"""Write the project's dependencies as requirement files, so that an image can install them before the code is there.

``torch.txt`` has PyTorch, which may come from an index of its own, ``others.txt`` all of them. Flower comes without
its simulation engine (Ray), which no role of a deployment needs; the accountant of private runs and the compiler for
fast decoding are in.
"""

import sys
import tomllib
from pathlib import Path

EXTRAS = ("dp", "fast")

project, out = Path(sys.argv[1]), Path(sys.argv[2])
table = tomllib.loads(project.read_text())["project"]
dependencies = [*table["dependencies"], *(line for extra in EXTRAS for line in table["optional-dependencies"][extra])]
dependencies = [line.replace("flwr[simulation]", "flwr") for line in dependencies]
out.mkdir(parents=True, exist_ok=True)
out.joinpath("others.txt").write_text("".join(f"{line}\n" for line in dependencies))
out.joinpath("torch.txt").write_text("".join(f"{line}\n" for line in dependencies if line.startswith("torch>")))
