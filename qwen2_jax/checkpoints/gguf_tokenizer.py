"""A Hugging Face tokenizer from the vocabulary and merges a GGUF file carries."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from core.base.errors import ModelError
from qwen2_jax.checkpoints.gguf import GgufFile

CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2_SPLIT = _LETTERS + r"|\p{N}" + _REST
LLAMA3_SPLIT = _LETTERS + r"|\p{N}{1,3}" + _REST


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut before the merges, and what llama.cpp implies by the name.

    split: None is GPT-2's pattern. digits: every digit on its own first. whole_words: a word that is in the vocabulary
    is not built from merges. add_bos: where the file does not say.
    """

    split: str | None = None
    digits: bool = False
    nfc: bool = False
    whole_words: bool = False
    add_bos: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        """The `tokenizers` object."""
        steps: list[pre_tokenizers.PreTokenizer] = []
        if self.digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        if self.split is not None:
            steps.append(pre_tokenizers.Split(Regex(self.split), behavior="isolated"))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.split is None))
        return pre_tokenizers.Sequence(steps)


_LLAMA3 = PreTokenizer(LLAMA3_SPLIT, whole_words=True, add_bos=True)
# Keys are values of tokenizer.ggml.pre.
PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(),
    "smollm": PreTokenizer(digits=True),
    "qwen2": PreTokenizer(QWEN2_SPLIT, nfc=True),
    "deepseek-r1-qwen": PreTokenizer(QWEN2_SPLIT, nfc=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
}


def gguf_tokenizer(file: GgufFile) -> PreTrainedTokenizerFast:
    """The tokenizer the model was trained with, chat template and special tokens included.

    Raises `ModelError` for a vocabulary that is not byte-level BPE or cut by a pattern not in `PRE_TOKENIZERS`.
    """
    kind, pre_name = file.metadata("tokenizer.ggml.model"), file.metadata("tokenizer.ggml.pre")
    if kind != "gpt2" or pre_name not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise ModelError(
            f"{file.url}: GGUF tokenizer {kind!r} with pre-tokenizer {pre_name!r} is not known "
            f"(known: gpt2 with {known}); give the model's own tokenizer with --tokenizer_path"
        )
    pre = PRE_TOKENIZERS[pre_name]
    tokens: list[str] = file.metadata("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in file.metadata("tokenizer.ggml.merges", [])]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre.whole_words))
    if pre.nfc:
        core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre.build()
    core.decoder = decoders.ByteLevel()
    for wanted, add in ((CONTROL, core.add_special_tokens), (USER_DEFINED, core.add_tokens)):
        types = file.metadata("tokenizer.ggml.token_type", [])
        add([AddedToken(t, normalized=False) for t, kind in zip(tokens, types, strict=False) if kind == wanted])
    special = _special_tokens(file, tokens)
    core.post_processor = _ends(file, pre, special, vocabulary)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        chat_template=file.metadata("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _special_tokens(file: GgufFile, tokens: list[str]) -> dict[str, str]:
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: file.metadata(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    return {name: tokens[index] for name, index in ids.items() if index is not None}


def _ends(
    file: GgufFile, pre: PreTokenizer, special: dict[str, str], vocabulary: dict[str, int]
) -> processors.PostProcessor:
    """What an encoded text begins and ends with when special tokens are added."""
    bos = special.get("bos_token") if file.metadata("tokenizer.ggml.add_bos_token", pre.add_bos) else None
    eos = special.get("eos_token") if file.metadata("tokenizer.ggml.add_eos_token", False) else None
    added = [token for token in (bos, eos) if token]
    return processors.TemplateProcessing(
        single=[piece for piece in (bos, "$A", eos) if piece],
        pair=[piece for piece in (bos, "$A", eos, bos, "$B:1", eos) if piece],
        special_tokens=[(token, vocabulary[token]) for token in dict.fromkeys(added)],
    )
