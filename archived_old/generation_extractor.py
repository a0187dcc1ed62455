"""Generation-based extraction with transformers: the baseline that the forward-pass extractor replaced."""

import argparse
import gzip
import json
import pickle
import time

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class GenerationExtractor:
    """Hooks on chosen layers of a model that generates token by token with its key-value cache."""

    def __init__(self, model_path: str, layers: list[int]) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model_path)
        self.model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
        self.seen: dict[int, list[np.ndarray]] = {layer: [] for layer in layers}
        for layer in layers:
            self.model.model.layers[layer].register_forward_hook(self._keep(layer))

    def _keep(self, layer: int):
        def hook(module, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            self.seen[layer].append(hidden[0].numpy())

        return hook

    def extract(self, text: str, new_tokens: int) -> dict[int, np.ndarray]:
        """Layer -> (T, D) for the prompt and everything generated behind it but the last token."""
        for steps in self.seen.values():
            steps.clear()
        with torch.no_grad():
            self.model.generate(**self.tokenizer(text, return_tensors="pt"), max_new_tokens=new_tokens, do_sample=False)
        return {layer: np.concatenate(steps) for layer, steps in self.seen.items()}


def main() -> None:
    """Reads `text` of each line of a stream and writes one gzipped pickle."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_path", required=True)
    parser.add_argument("--dataset_path", required=True, help='JSONL of {"text": …}')
    parser.add_argument("--layers", type=int, nargs="+", required=True)
    parser.add_argument("--max_tasks", type=int, default=8)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--output", default="generated.pkl.gz")
    args = parser.parse_args()
    extractor = GenerationExtractor(args.model_path, args.layers)
    with open(args.dataset_path, encoding="utf-8") as stream:
        texts = [json.loads(line)["text"] for _, line in zip(range(args.max_tasks), stream, strict=False)]
    started = time.monotonic()
    shard: dict[int, list[dict]] = {layer: [] for layer in args.layers}
    n_tokens = 0
    for index, text in enumerate(texts):
        activations = extractor.extract(text, args.new_tokens)
        n_tokens += len(next(iter(activations.values())))
        for layer, array in activations.items():
            shard[layer].append({"sample_idx": index, "activation": array, "shape": array.shape, "text_preview": text})
    with gzip.open(args.output, "wb") as file:
        pickle.dump(shard, file)
    seconds = time.monotonic() - started
    print(json.dumps({"samples": len(texts), "tokens": n_tokens, "tokens_per_second": n_tokens / seconds}))


if __name__ == "__main__":
    main()
