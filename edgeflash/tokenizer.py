"""Prompt -> token ids, as CLIP's own tokenizer gives them, without transformers.

Text is put in Unicode form C and lower case and cut into words, white space goes; the rest is
byte-pair encoding with ``</w>`` at the end of a word. Reads `tokenizer.json`, or the older pair
`vocab.json` and `merges.txt`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from edgeflash.bundle import Tokenizer
from edgeflash.errors import EdgeflashError

WORDS = (  # what CLIP calls a word; the blanks in between go
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
START, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class Tokens:
    """A prompt as the text encoder takes it.

    Attributes:
        ids: start, the prompt, end, padding: ``max_length`` of them.
        used: how many of them are not padding.
        cut: the end of the prompt that did not fit; "" where all did.
    """

    ids: tuple[int, ...]
    used: int
    cut: str


class ClipTokenizer:
    """Calls give `Tokens`; ``spec`` says the ids of start, end and padding, and the length."""

    def __init__(self, backend: Backend, spec: Tokenizer) -> None:
        self.backend = backend
        self.spec = spec

    def __call__(self, prompt: str) -> Tokens:
        spec = self.spec
        found = self.backend.encode(prompt, add_special_tokens=False)
        room = spec.max_length - 2
        ids = (spec.start_id, *found.ids[:room], spec.end_id)
        cut = prompt[found.offsets[room][0] :].strip() if len(found.ids) > room else ""
        return Tokens(ids + (spec.pad_id,) * (spec.max_length - len(ids)), len(ids), cut)


def read_tokenizer(bundle: Path, spec: Tokenizer) -> ClipTokenizer:
    """The tokenizer in the bundle's folder ``spec.folder``.

    Raises:
        EdgeflashError: the files are missing, unreadable, or not the ones the manifest describes.
    """
    folder = bundle / spec.folder
    try:
        if (folder / "tokenizer.json").is_file():
            backend = Backend.from_file(str(folder / "tokenizer.json"))
        else:
            backend = _from_pair(folder / "vocab.json", folder / "merges.txt")
    except Exception as error:  # the library raises bare Exception
        said = " ".join(str(error).split())
        raise EdgeflashError(f"{folder}: no readable CLIP tokenizer ({said})") from None
    backend.no_padding()
    backend.no_truncation()
    for field, token in (("start_id", START), ("end_id", END)):
        if (found := backend.token_to_id(token)) != (want := getattr(spec, field)):
            raise EdgeflashError(
                f"{folder}: {token} is token {found} here, but the manifest's tokenizer.{field} is "
                f"{want}; the tokenizer is not this bundle's: export it again"
            )
    return ClipTokenizer(backend, spec)


def _from_pair(vocab: Path, merges: Path) -> Backend:
    model = BPE.from_file(
        str(vocab), str(merges), unk_token=END, end_of_word_suffix="</w>", fuse_unk=False
    )
    backend = Backend(model)
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    special = [AddedToken(token, special=True, normalized=False) for token in (START, END)]
    backend.add_special_tokens(special)
    return backend


def write_vocabulary(folder: Path) -> None:
    """Adds vocab.json and merges.txt where only tokenizer.json is: older readers need the pair."""
    if (folder / "vocab.json").is_file():
        return
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    text = "\n".join(["#version: 0.2", *pairs]) + "\n"
    (folder / "merges.txt").write_text(text, encoding="utf-8")
