"""Tokenizers built from GGUF metadata, against transformers' own and against how the models were trained."""

import subprocess
import sys
from functools import lru_cache

import gguf
import pytest
from gguf_writing import finish
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from core.base.errors import ModelError
from qwen2_jax import load_tokenizer

TEXTS = [
    "",
    " ",
    "Hello world",
    "  leading, trailing  ",
    "tabs\tand\n\n\nnewlines\r\n   \n x",
    "1234567890 and 3.14159, -42",
    "it's we'll I'D they've",
    "naïve café — “quotes” … ß",
    "日本語のテキスト 한국어 العربية ไทย",
    "emoji 👩‍👩‍👧‍👦 flags 🇫🇷 zero​width",
    "def f(x):\n    return {'a': [x**2 for _ in range(10)]}  # done\n",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "< |im_start|> <|im_start",
    "a\x00b\x7f",
    "```grid shape: 2x3\n1 012\n2 345\n```",
]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2? <|im_end|>"}]


@pytest.fixture(scope="module")
def ours(smollm2):
    return load_tokenizer(str(smollm2))


@pytest.fixture(scope="module")
def theirs(smollm2):
    # It parses the whole vocabulary each time it wants to know anything.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gguf.GGUFReader", lru_cache(gguf.GGUFReader))
        return AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_tokens_are_those_of_transformers(text, ours, theirs):
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == text


def test_smollm2_chat_and_special_tokens_are_those_of_transformers(ours, theirs):
    for settings in ({"add_generation_prompt": True}, {"add_generation_prompt": False}):
        assert ours.apply_chat_template(CHAT, tokenize=False, **settings) == theirs.apply_chat_template(
            CHAT, tokenize=False, **settings
        )
    ours_ids, theirs_ids = (tokenizer.apply_chat_template(CHAT)["input_ids"] for tokenizer in (ours, theirs))
    assert ours_ids == theirs_ids
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        assert getattr(ours, name) == getattr(theirs, name) is not None
    assert len(ours) == len(theirs) == 49152
    assert sorted(ours.all_special_ids) == sorted(theirs.all_special_ids)


@pytest.mark.parametrize("text", ["a|  |7| |8", "x|\n\n|1|2", "of| |½|.", "\n|1| |0|0|7|\n|2"])
def test_smollm2_cuts_digits_off_before_anything_else(text, ours):
    # As its tokenizer.json and llama.cpp do; transformers' GGUF reading keeps the blank before a digit with it.
    pieces = text.split("|")
    assert ours.encode("".join(pieces)) == [token for piece in pieces for token in ours.encode(piece)]


def test_the_tokenizer_needs_no_torch(smollm2):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import qwen2_jax; assert 'transformers' not in sys.modules\n"
        "assert qwen2_jax.load_tokenizer(sys.argv[1]).encode('no torch')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(smollm2)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def write_tokenizer(path, pre, *, model="gpt2", add_bos=None):
    """A GGUF file that is all tokenizer: byte-level BPE trained on the texts above."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(
        TEXTS * 3, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    merges = [" ".join(pair) for pair in core_merges(core)]
    tokens = [token for token, _ in sorted(core.get_vocab().items(), key=lambda item: item[1])]
    tokens.append("zqzq")  # no merge leads to it
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    added = ["<tool_call>"]
    arch = "llama" if "llama" in pre else "qwen2"
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(1)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, *special, *added])
    writer.add_token_types([1] * len(tokens) + [3] * len(special) + [4] * len(added))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(len(tokens))
    writer.add_eos_token_id(len(tokens) + 2)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    finish(writer)


def core_merges(core):
    """The merges of a trained `tokenizers` model, in order."""
    import json

    return json.loads(core.to_str())["model"]["merges"]


@pytest.mark.parametrize(("pre", "add_bos"), [("qwen2", False), ("llama-bpe", True), ("gpt-2", False)])
def test_other_patterns_are_those_of_transformers(pre, add_bos, tmp_path):
    write_tokenizer(tmp_path / "t.gguf", pre, add_bos=add_bos)
    ours = load_tokenizer(str(tmp_path))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="t.gguf")
    for text in [*TEXTS, "12345678 <tool_call>x"]:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False), text
    starts_with_bos = ours.encode("x")[0] == ours.bos_token_id
    assert starts_with_bos is add_bos


def test_llama3_adds_bos_where_the_file_does_not_say(tmp_path):
    write_tokenizer(tmp_path / "t.gguf", "llama-bpe")
    ours = load_tokenizer(str(tmp_path))
    assert ours.encode("x")[0] == ours.bos_token_id
    assert ours.bos_token_id not in ours.encode("x", add_special_tokens=False)


@pytest.mark.parametrize(("pre", "is_whole"), [("llama-bpe", True), ("qwen2", False)])
def test_only_llama3_takes_whole_words_from_the_vocabulary(pre, is_whole, tmp_path):
    write_tokenizer(tmp_path / "t.gguf", pre, add_bos=False)
    assert (len(load_tokenizer(str(tmp_path)).encode("zqzq")) == 1) is is_whole


def test_qwen2_composes_unicode_as_it_was_trained_on(tmp_path):
    write_tokenizer(tmp_path / "t.gguf", "qwen2")
    ours = load_tokenizer(str(tmp_path))
    assert ours.encode("cafe\u0301") == ours.encode("caf\u00e9")


@pytest.mark.parametrize(("pre", "model"), [("tekken", "gpt2"), ("default", "llama")])
def test_an_unknown_kind_is_named_with_the_way_out(pre, model, tmp_path):
    write_tokenizer(tmp_path / "t.gguf", pre, model=model)
    with pytest.raises(ModelError, match=f"tokenizer '{model}' with pre-tokenizer '{pre}'.*--tokenizer_path"):
        load_tokenizer(str(tmp_path))
