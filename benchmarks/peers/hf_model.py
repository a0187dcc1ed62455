"""The model as transformers itself reads it, for every side that uses transformers."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from core.base.errors import RunError


def load_causal_lm(model_path: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """From a GGUF file or a folder, with transformers' default attention, ready for inference."""
    path = Path(model_path)
    if path.suffix != ".gguf":
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    # from_pretrained(gguf_file=…) needs one more package; the functions it calls do not.
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(path.parent, gguf_file=path.name), dtype=torch.float32
    )
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    found = model.load_state_dict(tensors, strict=False)
    if found.unexpected_keys or set(found.missing_keys) - {"lm_head.weight"}:
        raise RunError(f"{path}: transformers reads other weights than the model has: {found}")
    model.tie_weights()
    return model.to(dtype).eval()


def export_folder(model_path: str, folder: Path) -> Path:
    """The model as a Hugging Face folder, for libraries that can read only that.

    They also require a tokenizer. This one has a single word, because the prompts are token ids.
    """
    model = load_causal_lm(model_path)
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>"))
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<pad>")
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return folder
