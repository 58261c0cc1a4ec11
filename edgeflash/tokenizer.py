"""Prompt -> token ids, as CLIP's and T5's own tokenizers give them, without transformers.

CLIP: text is put in Unicode form C and lower case and cut into words, white space goes; the rest is
byte-pair encoding with ``</w>`` at the end of a word. Reads `tokenizer.json`, or the older pair
`vocab.json` and `merges.txt`. T5: a unigram model with rules of its own, all in `tokenizer.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
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
T5_END, T5_PAD = "</s>", "<pad>"
SPECIAL = {  # kind -> tokens whose ids must be those of the manifest
    "clip": {"start_id": START, "end_id": END},
    "t5": {"end_id": T5_END, "pad_id": T5_PAD},
}


@dataclass(frozen=True)
class Tokens:
    """A prompt as the text encoder takes it.

    Attributes:
        ids: start (of CLIP), the prompt, end, padding: ``max_length`` of them.
        used: how many of them are not padding.
        cut: the end of the prompt that did not fit; "" where all did.
    """

    ids: tuple[int, ...]
    used: int
    cut: str


class PromptTokenizer:
    """Calls give `Tokens`; ``spec`` says the ids of start, end and padding, and the length."""

    def __init__(self, backend: Backend, spec: Tokenizer) -> None:
        self.backend = backend
        self.spec = spec

    def __call__(self, prompt: str) -> Tokens:
        spec = self.spec
        prompt = prompt.lower().strip() if spec.lower else prompt
        found = self.backend.encode(prompt, add_special_tokens=False)
        start = () if spec.start_id is None else (spec.start_id,)
        room = spec.max_length - len(start) - 1
        ids = (*start, *found.ids[:room], spec.end_id)
        cut = prompt[found.offsets[room][0] :].strip() if len(found.ids) > room else ""
        return Tokens(ids + (spec.pad_id,) * (spec.max_length - len(ids)), len(ids), cut)


def unread(tokenizers: Iterable[PromptTokenizer], prompt: str) -> str:
    """The end of a prompt for which none of them has room; "" where one reads all of it."""
    return min((tokenize(prompt).cut for tokenize in tokenizers), key=len)


def read_tokenizer(bundle: Path, spec: Tokenizer) -> PromptTokenizer:
    """The tokenizer in the bundle's folder ``spec.folder``.

    Raises:
        EdgeflashError: the files are missing, unreadable, or not the ones the manifest describes.
    """
    folder = bundle / spec.folder
    if spec.kind == "t5":
        backend = _t5_backend(folder)
    else:
        backend = _clip_backend(folder)
    backend.no_padding()
    backend.no_truncation()
    for field, token in SPECIAL[spec.kind].items():
        if (found := backend.token_to_id(token)) != (want := getattr(spec, field)):
            raise EdgeflashError(
                f"{folder}: {token} is token {found} here, but the manifest's tokenizer.{field} is "
                f"{want}; the tokenizer is not this bundle's: export it again"
            )
    return PromptTokenizer(backend, spec)


def t5_tokenizer(folder: Path, max_length: int, *, lower: bool | None = None) -> Tokenizer:
    """What a T5 tokenizer's folder says; ``folder`` of the result is its last name.

    Args:
        folder: with `tokenizer.json`.
        max_length: tokens that a prompt is padded and cut to, the end token among them.
        lower: the family's pipeline makes letters small and takes outer blanks off.

    Raises:
        EdgeflashError: the file is missing, or lacks T5's special tokens.
    """
    backend = _t5_backend(folder)
    ids = {token: backend.token_to_id(token) for token in (T5_END, T5_PAD)}
    lacking = [token for token, found in ids.items() if found is None]
    if lacking:
        raise EdgeflashError(f"{folder}: no T5 tokenizer ({lacking[0]} is not in its vocabulary)")
    return Tokenizer(
        kind="t5",
        folder=folder.name,
        max_length=max_length,
        end_id=ids[T5_END],
        pad_id=ids[T5_PAD],
        lower=lower,
    )


def _t5_backend(folder: Path) -> Backend:
    if not (folder / "tokenizer.json").is_file():
        raise EdgeflashError(
            f"{folder}: tokenizer.json is missing, which T5's tokens are read from: pip install "
            f"sentencepiece, then transformers.T5Tokenizer.from_pretrained({str(folder)!r})"
            f".save_pretrained({str(folder)!r}) makes it of spiece.model"
        )
    try:
        return Backend.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception
        said = " ".join(str(error).split())
        raise EdgeflashError(f"{folder}: no readable T5 tokenizer ({said})") from None


def _clip_backend(folder: Path) -> Backend:
    try:
        if (folder / "tokenizer.json").is_file():
            return Backend.from_file(str(folder / "tokenizer.json"))
        return _from_pair(folder / "vocab.json", folder / "merges.txt")
    except Exception as error:  # the library raises bare Exception
        said = " ".join(str(error).split())
        raise EdgeflashError(f"{folder}: no readable CLIP tokenizer ({said})") from None


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
    """Adds vocab.json and merges.txt where only tokenizer.json is: older readers need the pair.

    A unigram model has neither.
    """
    if (folder / "vocab.json").is_file():
        return
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    if "merges" not in model:
        return
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    text = "\n".join(["#version: 0.2", *pairs]) + "\n"
    (folder / "merges.txt").write_text(text, encoding="utf-8")
