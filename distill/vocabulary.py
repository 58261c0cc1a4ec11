"""A CLIP tokenizer with a small vocabulary, trained on the captions at hand."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"


class SmallClipTokenizer:
    """Vocabulary and merges in CLIP's own file format, saved as a transformers tokenizer folder."""

    def __init__(self, captions: list[str], max_length: int) -> None:
        rules = CLIPTokenizer().backend_tokenizer
        trained = Tokenizer(BPE(end_of_word_suffix="</w>"))
        trained.normalizer, trained.pre_tokenizer = rules.normalizer, rules.pre_tokenizer
        trainer = BpeTrainer(vocab_size=2000, end_of_word_suffix="</w>", show_progress=False)
        trained.train_from_iterator(sorted(set(captions)), trainer)
        pairs = json.loads(trained.to_str())["model"]["merges"]
        self.merges = [tuple(pair) for pair in pairs]
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokens = [*letters, *(letter + "</w>" for letter in letters)]
        tokens += ["".join(pair) for pair in self.merges] + [START, END]
        self.vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
        self.max_length = max_length

    def build(self) -> CLIPTokenizer:
        return CLIPTokenizer(vocab=self.vocab, merges=self.merges, model_max_length=self.max_length)

    def save_pretrained(self, folder: str) -> None:
        """Writes tokenizer.json and config, and the vocab.json and merges.txt that apps read."""
        self.build().save_pretrained(folder)
        (Path(folder) / "vocab.json").write_text(json.dumps(self.vocab), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in self.merges)]
        (Path(folder) / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
