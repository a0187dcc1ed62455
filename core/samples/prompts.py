"""From stream records to samples: prompts, token ids and previews."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np

from arc24.data_augmentation import apply_data_augmentation, augmentation_for
from arc24.encoders import create_grid_encoder
from arc24.prompting import PROMPT_VERSIONS, create_prompts_from_task
from core.base.errors import UsageError
from core.dataset_utils import BadRecord, StreamRecord, sample_index
from core.samples.selection import TokenFacts, token_facts
from core.samples.windows import TokenizedSample

PREVIEW_PROMPT_CHARS = 100
PREVIEW_CHARS = 200
# Enough prompts in one call for the tokenizer's threads, few enough to need little memory.
_RECORDS_PER_CALL = 16


@dataclass(frozen=True)
class PromptOptions:
    """How records become prompts.

    Attributes:
      grid_encoder, prompt_version, predictions: for ARC tasks.
      seed: of the augmentations; a sample's prompt depends only on it and on the sample's position in the stream.
      max_seq_length: maximum tokens of a sample; longer ones are truncated or refused, by `overlong`.
    """

    grid_encoder: str
    prompt_version: str
    predictions: int
    seed: int
    max_seq_length: int
    overlong: str

    def validate(self) -> None:
        """Raises UsageError naming the invalid flag."""
        try:
            create_grid_encoder(self.grid_encoder)
        except ValueError as error:
            raise UsageError(f"--grid_encoder: {error}") from error
        if self.prompt_version not in PROMPT_VERSIONS:
            known = ", ".join(PROMPT_VERSIONS)
            raise UsageError(f"--prompt_version {self.prompt_version}: unknown; known are {known}")


class Tokenizer:
    """Turns records into samples; the tokenizer itself is loaded when the first record needs it.

    Args:
      load: loads a transformers tokenizer.
      vocab_size: of the model: token ids at or above it are refused.
    """

    def __init__(self, options: PromptOptions, load: Callable[[], Any], vocab_size: int) -> None:
        self._options = options
        self._load = load
        self._vocab_size = vocab_size
        self._grid_encoder = create_grid_encoder(options.grid_encoder)

    @cached_property
    def _tokenizer(self) -> Any:
        return self._load()

    def facts(self) -> TokenFacts:
        """The tokenizer's facts about token ids. Loads the tokenizer, and raises what loading raises."""
        return token_facts(self._tokenizer)

    def samples(
        self, records: Iterable[StreamRecord | BadRecord], first_sample_idx: int = 0
    ) -> Iterator[TokenizedSample | BadRecord]:
        """The samples of the records from `first_sample_idx` on, in stream order, bad records between them."""
        remaining = iter(records)
        while chunk := list(islice(remaining, _RECORDS_PER_CALL)):
            for item in self._tokenize(chunk):
                if isinstance(item, BadRecord) or item.sample_idx >= first_sample_idx:
                    yield item

    def _tokenize(self, chunk: list[StreamRecord | BadRecord]) -> Iterator[TokenizedSample | BadRecord]:
        prompts = [self._prompts(record) if isinstance(record, StreamRecord) else record for record in chunk]
        texts = [text for item in prompts if isinstance(item, list) for text in item if isinstance(text, str)]
        token_ids = iter(self._encode(texts, chunk))
        for record, item in zip(chunk, prompts, strict=True):
            if isinstance(record, BadRecord) or isinstance(item, BadRecord):
                yield item if isinstance(item, BadRecord) else record  # type: ignore[misc]
                continue
            encoded = [(text, next(token_ids) if isinstance(text, str) else text) for text in item]
            yield from self._finish(record, encoded)

    def _prompts(self, record: StreamRecord) -> list[str | list[int]] | BadRecord:
        """The prompt of each of the record's samples, as text or as token ids."""
        try:
            if record.kind == "arc":
                return [self._arc_prompt(record, prediction) for prediction in range(self._options.predictions)]
            if record.kind == "messages":
                return [self._chat(record.payload)]
        except ValueError as error:
            return BadRecord(record.position, record.line, str(error))
        return [record.payload]

    def _arc_prompt(self, record: StreamRecord, prediction: int) -> str:
        task = record.payload
        augmentation = augmentation_for(self._options.seed, record.position, prediction, len(task["train"]))
        augmented = apply_data_augmentation(task, augmentation)
        first_test = {**augmented, "test": augmented["test"][:1]}
        return create_prompts_from_task(first_test, self._grid_encoder, self._tokenizer, self._options.prompt_version)[
            0
        ]

    def _chat(self, messages: list[dict[str, str]]) -> str:
        if self._tokenizer.chat_template is None:
            raise UsageError("the stream holds messages but the tokenizer has no chat template: pass --tokenizer_path")
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # templates raise what they like
            raise ValueError(f"the chat template refuses the messages: {error}") from error

    def _encode(self, texts: list[str], chunk: list[StreamRecord | BadRecord]) -> list[list[int]]:
        if not texts:
            return []
        kind = next(record.kind for record in chunk if isinstance(record, StreamRecord))
        templated = kind == "messages" or (kind == "arc" and self._tokenizer.chat_template is not None)
        encoded = self._tokenizer(texts, add_special_tokens=not templated, return_attention_mask=False, verbose=False)
        return encoded["input_ids"]

    def _finish(
        self, record: StreamRecord, encoded: list[tuple[str | list[int], list[int]]]
    ) -> Iterator[TokenizedSample | BadRecord]:
        reason = next(filter(None, (self._refusal(ids) for _, ids in encoded)), None)
        if reason:
            # All samples of a record are refused together: a partial task would be an unnoticed gap.
            yield BadRecord(record.position, record.line, reason)
            return
        for prediction, (prompt, ids) in enumerate(encoded):
            index = sample_index(record, prediction, self._options.predictions)
            yield TokenizedSample(
                sample_idx=index,
                position=record.position,
                samples_per_record=len(encoded),
                token_ids=np.asarray(ids[: self._options.max_seq_length], np.int32),
                full_length=len(ids),
                text_preview=text_preview(record, index, prompt),
                labels=record.labels if record.task_id is None else record.labels | {"task_id": record.task_id},
            )

    def _refusal(self, ids: list[int]) -> str | None:
        if not ids:
            return "it has no tokens"
        outside = next((token for token in (min(ids), max(ids)) if not 0 <= token < self._vocab_size), None)
        if outside is not None:
            return f"token id {outside} is not in 0..{self._vocab_size - 1}"
        if self._options.overlong == "refuse" and len(ids) > self._options.max_seq_length:
            return f"it has {len(ids)} tokens, more than --max_seq_length {self._options.max_seq_length}"
        return None


def text_preview(record: StreamRecord, sample_idx: int, prompt: str | list[int]) -> str:
    """`Task: {id}, Prompt: {first 100 characters}`, at most 200 characters; token ids where the text is unknown."""
    text = prompt if isinstance(prompt, str) else " ".join(map(str, prompt[:PREVIEW_PROMPT_CHARS]))
    name = record.task_id if record.task_id is not None else str(sample_idx)
    return f"Task: {name}, Prompt: {text[:PREVIEW_PROMPT_CHARS]}"[:PREVIEW_CHARS]
