r"""Text for pre-training: from files and folders to documents, a tokenizer, and one stream of tokens.

A source is the path of a file or folder. In a folder, and in the folders in it, every text file is a document. A data
file (JSON Lines, JSON, CSV, TSV, Parquet) is named itself; each of its records is a document, written by a template
that follows the path after two colons:

    /usr/lib/python3.11
    /data/medquad/public.jsonl::{question}\n{answer}

What is trained on these tokens is not decided here.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fedpt_flwr.data import read_records
from fedpt_flwr.errors import DataError
from fedpt_flwr.paths import expanded, is_there
from fedpt_flwr.prompts import Template

EOS_TOKEN, PAD_TOKEN = "<eos>", "<pad>"

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".html", ".tex")
"""Files that are documents as they stand."""

_ALWAYS_SKIPPED = ("__pycache__", "site-packages", "dist-packages", "node_modules", ".*")
_TOKENISED_TOGETHER = 1024
_HELD_OUT_SHARE, _HELD_OUT_CHARS = 0.01, 200_000


# --- documents --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Source:
    """Where text comes from.

    Attributes:
        path: A file or folder, absolute.
        template: How a record becomes a document, for a data file; None: its field ``text``.
    """

    path: Path
    template: str | None = None

    @classmethod
    def parse(cls, text: str) -> Source:
        r"""Read ``PATH`` or ``PATH::TEMPLATE``; ``\n`` in a template is a line break.

        Raises:
            DataError: The template is none, or has no field.
        """
        path, colons, template = text.partition("::")
        if colons and not Template(template).fields:
            raise DataError(
                "a template must have a field of the records in braces", value=template, remedy="write such as {text}"
            )
        return cls(expanded(path).absolute(), template.replace("\\n", "\n") if colons else None)


def read_documents(source: Source, *, exclude: Sequence[str] = ()) -> list[str]:
    """The documents of a source, each once, in the order of files' names and of records.

    Args:
        source: Where they are.
        exclude: Names of files and folders that are left out, with ``*`` for anything. Caches, installed packages and
            names that begin with a dot are left out of a folder in any case, and so are files that are not UTF-8.

    Raises:
        DataError: There is no such file or folder, it has no text, or a record lacks a field of the template.
    """
    path, template = source.path, source.template
    if not is_there(path):
        raise DataError("there is no such file or folder", place=str(path), remedy="check the path")
    if path.is_dir() or path.suffix.lower() in TEXT_SUFFIXES:
        if template is not None:
            raise DataError(
                "a template is for the records of a data file", value=template, place=str(path), remedy="leave it out"
            )
        texts = list(_read_texts(path, exclude))
    else:
        written = Template("{text}" if template is None else template)
        records = read_records(str(path))
        texts = [written.render(record, place=f"{path}, record {place}") for place, record in enumerate(records, 1)]
    documents = list(dict.fromkeys(text.strip() for text in texts if text.strip()))
    if not documents:
        raise DataError(
            "no text was found", place=str(path), remedy=f"a folder must have files with {', '.join(TEXT_SUFFIXES)}"
        )
    return documents


def _read_texts(path: Path, exclude: Sequence[str]) -> Iterator[str]:
    for file in [path] if path.is_file() else _walk(path, (*_ALWAYS_SKIPPED, *exclude)):
        try:
            yield file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            if file == path:  # it was named, so it was meant
                raise DataError(f"the text must be UTF-8 ({error.reason})", place=str(file)) from error
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror or error})", place=str(file)) from error


def _walk(folder: Path, exclude: Sequence[str]) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if any(fnmatch.fnmatch(entry.name, pattern) for pattern in exclude):
            continue
        if entry.is_dir() and not entry.is_symlink():  # links may lead round in circles
            yield from _walk(entry, exclude)
        elif entry.suffix.lower() in TEXT_SUFFIXES and entry.is_file():
            yield entry


def hash_documents(documents: Sequence[str]) -> str:
    """A fingerprint of documents and of their order, in hex."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(len(document).to_bytes(8, "big") + document.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def hold_out(documents: Sequence[str], *, seed: int) -> tuple[list[str], list[str]]:
    """Keep some documents back to measure a model on, and shuffle the others.

    Args:
        documents: Documents of one source.
        seed: Decides which, and the order of the others.

    Returns:
        Documents to train on, at least one; and others with a hundredth of the characters, at most 200,000 and none of
        them longer than that. Where there are fewer than two documents, none is held out.
    """
    wanted = min(_HELD_OUT_CHARS, _HELD_OUT_SHARE * sum(map(len, documents)))
    held_out: list[str] = []
    kept: list[str] = []
    taken = 0
    for index in np.random.default_rng(seed).permutation(len(documents)).tolist():
        document = documents[index]
        is_last = len(held_out) == len(documents) - 1
        if taken < wanted and taken + len(document) <= _HELD_OUT_CHARS and not is_last:
            held_out.append(document)
            taken += len(document)
        else:
            kept.append(document)
    return kept, held_out


def repetitions(sizes: Sequence[int], *, balance: float) -> list[float]:
    """How often every source is read for one reading of the largest.

    Drawn in proportion to its size, a small source would hardly be seen beside a large one. So each is drawn in
    proportion to its size to the power of ``balance``, as the languages of a multilingual model are (Conneau et al.
    2020, arXiv:1911.02116).

    Args:
        sizes: Of the sources, in characters.
        balance: From 0, every source as much as the others, to 1, each as much as its size.

    Returns:
        At least 1 for each, and 1 for the largest.
    """
    return [(max(sizes) / size) ** (1 - balance) for size in sizes]


def repeated(tokens: Tensor, times: float) -> Tensor:
    """A stream so many times: whole copies, then its beginning for the part that is left."""
    whole, part = divmod(times, 1.0)
    return torch.cat([tokens.repeat(int(whole)), tokens[: round(part * len(tokens))]])


# --- tokens -----------------------------------------------------------------------------------------------------------


def train_tokenizer(documents: Sequence[str], *, vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on some documents; any text can be encoded.

    ``<eos>`` ends an answer, separates the documents of pre-training, and is the beginning-of-text token as well, as
    in GPT-2. Nothing is added to an encoded text.

    Args:
        documents: Text to find the tokens in.
        vocab_size: Tokens at most; fewer where the documents do not give that many.
        max_length: Longest sequence in tokens that the models can read.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN, PAD_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=EOS_TOKEN,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str]) -> Tensor:
    """All documents as token ids, each after an end-of-text token, ``(length,)`` int64."""
    parts: list[Tensor] = []
    for begin in range(0, len(documents), _TOKENISED_TOGETHER):
        texts = list(documents[begin : begin + _TOKENISED_TOGETHER])
        # verbose=False: a document that is longer than the model's context is cut into windows, which needs no warning.
        encoded = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
        parts += [torch.tensor([tokenizer.eos_token_id, *ids]) for ids in encoded]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
