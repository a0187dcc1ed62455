"""ARC tasks as prompts: the messages of a chat, and their text with the assistant's turn left open.

The assistant's turn begins with a heading and the text that every grid starts with, so that the last tokens of the
prompt are those right before the model's answer.
"""

from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from arc24.encoders import GridEncoder
from arc24.tasks import SIDES, Grid, Task

DEFAULT_PROMPT_VERSION = "output-from-examples-v0"

Message = dict[str, str]

# Lines of a response that are searched for a grid; ARC grids have at most 30 rows.
_MAX_GRID_LINES = 256


@dataclass(frozen=True)
class PromptVersion:
    """The system text of a prompt, the sides of a pair it shows, and the side it asks for."""

    system: str
    shown: tuple[str, ...]
    asked: str

    @property
    def has_test_case(self) -> bool:
        """Whether the prompt shows a test input; if not, the model has to give a grid without one."""
        return self.shown == SIDES


PROMPT_VERSIONS = {
    "output-from-examples-v0": PromptVersion(
        system=(
            "You solve puzzles of the Abstraction and Reasoning Corpus. The user shows pairs of an input grid and an "
            "output grid, all made by the same rule, and then one more input grid. Find the rule and answer with the "
            "output grid that it makes of the last input, written the way the examples are written."
        ),
        shown=SIDES,
        asked="output",
    ),
    "output-from-examples-v1": PromptVersion(
        system=(
            "You solve puzzles of the Abstraction and Reasoning Corpus. A grid is a rectangle of cells, and each cell "
            "has one of ten colours; the first colour is usually the background. One rule turns every input grid of a "
            "puzzle into its output grid. It may move, copy, count, mirror, complete or recolour what is drawn, and "
            "the output may have another size. Work the rule out from the examples and apply it to the input of the "
            "test case. Answer with the output grid alone, written the way the examples are written."
        ),
        shown=SIDES,
        asked="output",
    ),
    "input-from-inputs-v0": PromptVersion(
        system=(
            "The user shows input grids of one puzzle of the Abstraction and Reasoning Corpus, all drawn in the same "
            "manner. Answer with one more input grid that could belong to the puzzle, written the way the examples "
            "are written."
        ),
        shown=("input",),
        asked="input",
    ),
    "output-from-outputs-v0": PromptVersion(
        system=(
            "The user shows output grids of one puzzle of the Abstraction and Reasoning Corpus, all made by the same "
            "rule. Answer with one more output grid that could belong to the puzzle, written the way the examples "
            "are written."
        ),
        shown=("output",),
        asked="output",
    ),
}


def create_messages(
    task: Task, grid_encoder: GridEncoder, prompt_version: str = DEFAULT_PROMPT_VERSION
) -> list[Message]:
    """System text, user text and the opened assistant turn for the first test of `task`.

    Tests after the first are not shown; `create_prompts_from_task` makes a prompt for each.
    Raises ValueError if the prompt version is unknown.
    """
    version = _prompt_version(prompt_version)
    blocks = []
    for number, pair in enumerate(task["train"], 1):
        blocks.append(f"## Example {number}")
        blocks += [_grid_block(side, pair[side], grid_encoder) for side in version.shown]
    if version.has_test_case:
        blocks += ["## Test case", _grid_block("input", task["test"][0]["input"], grid_encoder)]
    opening = f"{_heading(version.asked)}\n\n{grid_opening(grid_encoder)}".rstrip()
    return [
        {"role": "system", "content": version.system},
        {"role": "user", "content": "\n\n".join(blocks)},
        {"role": "assistant", "content": opening},
    ]


def create_prompts_from_task(
    task: Task, grid_encoder: GridEncoder, tokenizer: Any, prompt_version: str = DEFAULT_PROMPT_VERSION
) -> list[str]:
    """One prompt for each test of `task`, in order. The stream's sample is the first.

    `tokenizer` has `chat_template` and, unless that is None, `apply_chat_template`. With a template the prompt contains
    the special tokens that the template writes, so it is tokenized without adding any; without a template it is plain
    text. Versions that show no test case give the same prompt for every test.
    """
    return [
        _render(create_messages({**task, "test": [test]}, grid_encoder, prompt_version), tokenizer)
        for test in task["test"]
    ]


def grid_opening(grid_encoder: GridEncoder) -> str:
    """The text that every grid starts with, without trailing white space, e.g. '```grid shape:'.

    The white space is left to the model: most tokenizers join a space with the following word, so a prompt that ends in
    a space would end in a token that is not seen elsewhere.
    """
    # These two grids differ in rows, columns and colors, so their texts share only what all grids share.
    texts = zip(grid_encoder.to_text([[0]]), grid_encoder.to_text([[1, 1], [1, 1]]), strict=False)
    return "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], texts)).rstrip()


def parse_grid_from_response(text: str, grid_encoder: GridEncoder) -> Grid:
    """The grid in a model's response, whether the response continues the prompt's opening or repeats it.

    Text before the heading or the block, and after the grid, is ignored. Raises ValueError if there is no grid.
    """
    opening = grid_opening(grid_encoder)
    starts = [opening + text, text]
    starts += [text.partition(heading)[2].lstrip() for heading in map(_heading, reversed(SIDES)) if heading in text]
    if opening in text:
        starts.append(text[text.index(opening) :])
    for start in starts:
        grid = _longest_grid(start, grid_encoder)
        if grid is not None:
            return grid
    raise ValueError(f"no grid in the response: {text[:60]!r}")


def _longest_grid(text: str, grid_encoder: GridEncoder) -> Grid | None:
    """The grid in the longest valid prefix of lines; encoders without a closing line end where the digits end."""
    lines = [line.rstrip() for line in text.split("\n")[:_MAX_GRID_LINES]]
    grid = None
    for count in range(1, len(lines) + 1):
        try:
            grid = grid_encoder.to_grid("\n".join(lines[:count]))
        except ValueError:
            if grid is not None:
                break
    return grid


def _prompt_version(name: str) -> PromptVersion:
    if name not in PROMPT_VERSIONS:
        raise ValueError(f"unknown prompt version {name!r}: known are {', '.join(PROMPT_VERSIONS)}")
    return PROMPT_VERSIONS[name]


def _heading(side: str) -> str:
    return f"### {side.capitalize()}"


def _grid_block(side: str, grid: Grid, grid_encoder: GridEncoder) -> str:
    return f"{_heading(side)}\n\n{grid_encoder.to_text(grid)}"


def _render(messages: list[Message], tokenizer: Any) -> str:
    system, user, assistant = messages
    if getattr(tokenizer, "chat_template", None) is None:
        return "\n\n".join(message["content"] for message in messages)
    try:
        turns = _apply(tokenizer, [system, user])
    except Exception:
        # Templates such as Gemma's refuse a system turn with their own exceptions; other errors are raised again below.
        turns = _apply(tokenizer, [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}])
    return turns + assistant["content"]


def _apply(tokenizer: Any, messages: list[Message]) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
