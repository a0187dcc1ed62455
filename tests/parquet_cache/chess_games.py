"""Legal chess games as texts of UCI moves, a tokenizer of 72 words for them, and a small GPT-2 that reads them."""

import json
import random
from pathlib import Path

import chess

SQUARES = [file + rank for rank in "12345678" for file in "abcdefgh"]
VOCAB = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "q": 4, "r": 5, "b": 6, "n": 7} | {
    square: place for place, square in enumerate(SQUARES, 8)
}
N_LAYERS, D_MODEL, N_POSITIONS = 3, 32, 96


def game(seed: int, longest: int = 40) -> str:
    """Random legal moves, at least two."""
    rng, board, moves = random.Random(seed), chess.Board(), []
    for _ in range(rng.randint(2, longest)):
        legal = sorted(move.uci() for move in board.legal_moves)
        if not legal:
            break
        moves.append(rng.choice(legal))
        board.push_uci(moves[-1])
    return " ".join(moves)


def rows(n: int) -> list[dict]:
    """Games with labels of every kind: texts, whole numbers, nulls, and lists with nulls."""
    made = []
    for i in range(n):
        scores = [None if k % 5 == 4 else round(k * 0.25 - 1, 2) for k in range(i % 7)]
        made.append(
            {
                "Transcript": game(i),
                "Site": f"https://lichess.org/{i:08x}",
                "WhiteElo": None if i % 6 == 5 else 1500 + 37 * (i * 7 % 20),
                "BlackElo": 1400 + i,
                "Scores": scores,
            }
        )
    return made


def write_rows(path: Path, made: list[dict]) -> Path:
    """As JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def write_tokenizer(folder: Path) -> None:
    """WordLevel over squares and promotions: a move is its two squares, and a piece where a pawn promotes."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel(VOCAB, unk_token="<unk>"))
    cut = pre_tokenizers.Split(Regex("[a-h][1-8]|[qrbn]"), behavior="isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), cut])
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def write_gpt2(folder: Path, n_positions: int = N_POSITIONS) -> Path:
    """Random weights, larger than GPT-2's own, so that layers differ."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(VOCAB),
        n_positions=n_positions,
        n_embd=D_MODEL,
        n_layer=N_LAYERS,
        n_head=4,
        initializer_range=0.2,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder
