"""Generation-based extraction with transformers: the baseline that the forward-pass extractor replaced."""

import argparse
import gzip
import json
import pickle
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


class GenerationExtractor:
    """Hooks on chosen layers of a model that generates token by token with its key-value cache, one prompt at a time.

    The first step sees the whole prompt, each later one the token that the step before has chosen.
    """

    def __init__(self, model: PreTrainedModel, layers: list[int]) -> None:
        # transformers types `generate` as a tensor.
        self.model: Any = model
        self.seen: dict[int, list[np.ndarray]] = {layer: [] for layer in layers}
        self.hooks = [
            self.model.model.layers[layer].register_forward_hook(self._keep(self.seen[layer])) for layer in layers
        ]

    @staticmethod
    def _keep(steps: list[np.ndarray]):
        def hook(module, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            steps.append(hidden[0].numpy())

        return hook

    def extract(self, token_ids: np.ndarray, new_tokens: int) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """Generates greedily, at most `new_tokens`, and stops where the model ends its answer.

        Returns the T tokens that the layers saw, the prompt and all that was generated but the last token, and layer ->
        (T, D) in float32.
        """
        for steps in self.seen.values():
            steps.clear()
        prompt = torch.as_tensor(token_ids, dtype=torch.long)[None]
        with torch.no_grad():
            generated = self.model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, do_sample=False
            )
        return generated[0, :-1].numpy(), {layer: np.concatenate(steps) for layer, steps in self.seen.items()}

    def write_shard(
        self, prompts: Iterable[tuple[int, str, np.ndarray]], new_tokens: int, path: Path
    ) -> list[np.ndarray]:
        """Writes one gzipped pickle of the prompts, given as (sample_idx, text_preview, token ids).

        Returns the tokens of each that the layers saw.
        """
        shard: dict[int, list[dict]] = {layer: [] for layer in self.seen}
        seen_tokens = []
        for sample_idx, preview, token_ids in prompts:
            tokens, activations = self.extract(token_ids, new_tokens)
            seen_tokens.append(tokens)
            for layer, array in activations.items():
                item = {"sample_idx": sample_idx, "activation": array, "shape": array.shape, "text_preview": preview}
                shard[layer].append(item)
        with gzip.open(path, "wb") as file:
            pickle.dump(shard, file)
        return seen_tokens


def main() -> None:
    """Reads `text` of each line of a stream and writes one gzipped pickle."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_path", required=True)
    parser.add_argument("--dataset_path", required=True, help='JSONL of {"text": …}')
    parser.add_argument("--layers", type=int, nargs="+", required=True)
    parser.add_argument("--max_tasks", type=int, default=8)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path("generated.pkl.gz"))
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model_path)
    model = AutoModelForCausalLM.from_pretrained(args.model_path, dtype=torch.float32).eval()
    with open(args.dataset_path, encoding="utf-8") as stream:
        texts = [json.loads(line)["text"] for _, line in zip(range(args.max_tasks), stream, strict=False)]
    started = time.monotonic()
    prompts = ((index, text, np.array(tokenizer(text).input_ids)) for index, text in enumerate(texts))
    seen = GenerationExtractor(model, args.layers).write_shard(prompts, args.new_tokens, args.output)
    n_tokens, seconds = sum(map(len, seen)), time.monotonic() - started
    print(json.dumps({"samples": len(texts), "tokens": n_tokens, "tokens_per_second": n_tokens / seconds}))


if __name__ == "__main__":
    main()
