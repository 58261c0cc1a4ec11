"""Our tokenizer against transformers' own, id by id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from edgeflash.bundle import Tokenizer as Spec
from edgeflash.errors import EdgeflashError
from edgeflash.tokenizer import PromptTokenizer, read_tokenizer

LENGTH = 24
CORPUS = """a small red star left of a large blue ring on a beige background
it's the café's naïve 3rd photo, isn't it? don't! they've we'll i'm you'd we're
2 stars & 10 rings: #1, $5.00 (50% off) — “quoted” 日本語 привет
""".splitlines()
TRICKY = (
    "",
    " ",
    "a red star",
    "A RED  Star\t\n ring ",
    "it's IT'S don't 've they'll",
    "3rd 2024 10rings",
    "cafe\u0301 caf\u00e9 na\u00efve \u0130stanbul \u00df \u1e9e \ufb01",
    "!!! ... ,,, #1 $5.00 (50% off) -- _under_score_",
    "\u65e5\u672c\u8a9e \u043f\u0440\u0438\u0432\u0435\u0442 \U0001f600 a\u200bb \u00a0x\u3000y",
    "<|startoftext|> a <|endoftext|> star",
    "<|STARTOFTEXT|> <|endoftext|",
    "a</w> star</w>",
    "\x00\x07 control \x7f",
    "star " * 40,
    "\u0664\u0662 \u2167 \u00b2 x\u0301\u0302",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """vocab.json and merges.txt, trained on a few lines the way CLIP's were."""
    backend = Tokenizer(BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = pre_tokenizers.Split(
        Regex(r"'s|'t|'re|'ve|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", True
    )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    trainer = BpeTrainer(
        vocab_size=700,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    out: Path = tmp_path_factory.mktemp("clip") / "tokenizer"
    out.mkdir()
    backend.model.save(str(out))
    return out


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=LENGTH)


def spec_of(folder: Path, **changes: Any) -> Spec:
    fields = {"start_id": 0, "end_id": 1, "pad_id": 1, "max_length": LENGTH, "folder": folder.name}
    return Spec(kind="clip", **fields | changes)


@pytest.fixture(scope="module", params=["pair", "json"])
def ours(request: Any, folder: Path, reference: Any, tmp_path_factory: Any) -> PromptTokenizer:
    """Read from vocab.json and merges.txt, and from the tokenizer.json that transformers saves."""
    if request.param == "json":
        whole = tmp_path_factory.mktemp("json") / "tokenizer"
        reference.save_pretrained(whole)
        for name in ("vocab.json", "merges.txt"):
            (whole / name).unlink(missing_ok=True)
        assert (whole / "tokenizer.json").is_file()
        folder = whole
    return read_tokenizer(folder.parent, spec_of(folder))


def ids(reference: Any, text: str) -> tuple[int, ...]:
    options = {"padding": "max_length", "truncation": True, "max_length": LENGTH}
    return tuple(reference(text, **options).input_ids)


@pytest.mark.parametrize("text", TRICKY, ids=range(len(TRICKY)))
def test_tricky_strings(ours: PromptTokenizer, reference: Any, text: str) -> None:
    assert ours(text).ids == ids(reference, text)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    text=st.text(st.characters(codec="utf-8"), max_size=40) | st.text("aA's tr<|>9é\n", max_size=40)
)
def test_any_string(ours: PromptTokenizer, reference: Any, text: str) -> None:
    assert ours(text).ids == ids(reference, text)


def test_what_is_cut_is_told_in_the_writer_s_own_letters(ours: PromptTokenizer) -> None:
    room = LENGTH - 2
    whole = ours("star " * room)
    assert whole.cut == "" and whole.used == LENGTH
    over = ours("Star " * room + " LARGE  Ring!")
    assert over.cut == "LARGE  Ring!" and over.used == LENGTH
    assert over.ids == whole.ids and over.ids[-1] == 1


def test_padding_is_the_manifest_s(folder: Path) -> None:
    tokens = read_tokenizer(folder.parent, spec_of(folder, pad_id=2))("a star")
    assert tokens.used < LENGTH
    assert set(tokens.ids[tokens.used :]) == {2} and tokens.ids[tokens.used - 1] == 1


def test_padding_and_truncation_in_the_file_do_not_matter(
    reference: Any, folder: Path, tmp_path: Path
) -> None:
    backend = Tokenizer.from_str(reference.backend_tokenizer.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=9, pad_id=5)
    (tmp_path / "t").mkdir()
    backend.save(str(tmp_path / "t/tokenizer.json"))
    tokens = read_tokenizer(tmp_path, spec_of(tmp_path / "t"))
    for text in ("a", "a small red star left of a large blue ring"):
        assert tokens(text) == read_tokenizer(folder.parent, spec_of(folder))(text)


def test_wrong_files_are_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EdgeflashError, match="no readable CLIP tokenizer"):
        read_tokenizer(tmp_path, spec_of(tmp_path / "absent"))
    with pytest.raises(EdgeflashError, match=r"token 1 here, .* tokenizer\.end_id is 49407"):
        read_tokenizer(folder.parent, spec_of(folder, end_id=49407))
    (tmp_path / "t").mkdir()
    (tmp_path / "t/tokenizer.json").write_text('{"version": "1.0",\n "model": {}')
    with pytest.raises(EdgeflashError, match="no readable CLIP tokenizer") as caught:
        read_tokenizer(tmp_path, spec_of(tmp_path / "t"))
    assert "\n" not in str(caught.value)
