import re

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from arc24.encoders import DEFAULT_GRID_ENCODER, create_grid_encoder
from arc24.prompting import (
    PROMPT_VERSIONS,
    create_messages,
    create_prompts_from_task,
    grid_opening,
    parse_grid_from_response,
)

TASK = {
    "train": [{"input": [[1, 1]], "output": [[2], [2]]}, {"input": [[3, 3]], "output": [[4], [4]]}],
    "test": [{"input": [[5, 5]], "output": [[6], [6]]}, {"input": [[7, 7]]}],
}
DEFAULT = create_grid_encoder(DEFAULT_GRID_ENCODER)
ENCODERS = [
    "MinimalGridEncoder()",
    "GridWithSeparationEncoder(' ')",
    "RowNumberEncoder(MinimalGridEncoder())",
    "GridCodeBlockEncoder(RepeatNumberEncoder(2))",
    "ReplaceNumberEncoder(RowNumberEncoder(MinimalGridEncoder()))",
    "GridCodeBlockEncoder(GridShapeEncoder(MinimalGridEncoder()))",
    "RowNumberEncoder(GridShapeEncoder(MinimalGridEncoder()))",
    DEFAULT_GRID_ENCODER,
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


def tokenizer(chat_template):
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    made.chat_template = chat_template
    return made


@pytest.mark.parametrize("version", PROMPT_VERSIONS)
def test_chat_prompt_is_what_transformers_renders_for_a_message_to_continue(version):
    chat = tokenizer(CHATML)
    messages = create_messages(TASK, DEFAULT, version)
    expected = chat.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert create_prompts_from_task(TASK, DEFAULT, chat, version)[0] == expected


def test_messages_are_a_system_text_the_examples_and_an_opened_answer():
    system, user, assistant = create_messages(TASK, create_grid_encoder("MinimalGridEncoder()"))
    assert [system["role"], user["role"], assistant["role"]] == ["system", "user", "assistant"]
    assert user["content"].split("\n\n") == [
        *("## Example 1", "### Input", "11", "### Output", "2\n2"),
        *("## Example 2", "### Input", "33", "### Output", "4\n4"),
        *("## Test case", "### Input", "55"),
    ]
    assert assistant["content"] == "### Output"
    assert create_messages(TASK, DEFAULT)[2]["content"] == "### Output\n\n```grid shape:"


@pytest.mark.parametrize(
    ("version", "shown", "asked"),
    [
        ("output-from-examples-v0", "122334455", "### Output"),
        ("output-from-examples-v1", "122334455", "### Output"),
        ("input-from-inputs-v0", "1133", "### Input"),
        ("output-from-outputs-v0", "2244", "### Output"),
    ],
)
def test_each_version_shows_and_asks_what_its_name_says(version, shown, asked):
    messages = create_messages(TASK, create_grid_encoder("MinimalGridEncoder()"), version)
    text = re.sub(r"## Example \d", "", messages[1]["content"])
    assert set(re.findall(r"\d", text)) == set(shown)
    assert messages[2]["content"] == asked
    headings = set(re.findall(r"^### \w+$", messages[1]["content"], re.MULTILINE))
    assert (
        headings
        == {
            "output-from-examples-v0": {"### Input", "### Output"},
            "output-from-examples-v1": {"### Input", "### Output"},
            "input-from-inputs-v0": {"### Input"},
            "output-from-outputs-v0": {"### Output"},
        }[version]
    )


def test_versions_have_different_system_texts():
    assert len({create_messages(TASK, DEFAULT, version)[0]["content"] for version in PROMPT_VERSIONS}) == 4


def test_every_test_input_has_its_prompt_and_the_first_is_the_messages_one():
    first, second = create_prompts_from_task(TASK, DEFAULT, tokenizer(CHATML))
    assert "1 55" in first
    assert "1 77" not in first
    assert "1 77" in second
    assert "1 55" not in second


def test_base_model_gets_plain_text():
    prompt = create_prompts_from_task(TASK, DEFAULT, tokenizer(None))[0]
    system, user, assistant = create_messages(TASK, DEFAULT)
    assert prompt == f"{system['content']}\n\n{user['content']}\n\n{assistant['content']}"


def test_template_without_system_turn_gets_the_system_text_in_the_user_turn():
    prompt = create_prompts_from_task(TASK, DEFAULT, tokenizer(NO_SYSTEM + CHATML))[0]
    system, user, assistant = create_messages(TASK, DEFAULT)
    assert prompt == (
        f"<|im_start|>user\n{system['content']}\n\n{user['content']}<|im_end|>\n"
        f"<|im_start|>assistant\n{assistant['content']}"
    )


def test_template_error_that_has_nothing_to_do_with_the_system_turn_is_raised():
    with pytest.raises(Exception, match="broken"):
        create_prompts_from_task(TASK, DEFAULT, tokenizer("{{ raise_exception('broken') }}"))


def test_unknown_version_is_refused_with_the_known_ones():
    with pytest.raises(ValueError) as refusal:
        create_messages(TASK, DEFAULT, "v9")
    assert all(name in str(refusal.value) for name in ["v9", *PROMPT_VERSIONS])


@pytest.mark.parametrize("expression", ENCODERS)
@pytest.mark.parametrize("grid", [[[0]], [[1, 2, 3]], [[i % 10, 9 - i % 10] for i in range(12)]])
def test_opening_starts_every_grid_and_ends_in_no_space(expression, grid):
    encoder = create_grid_encoder(expression)
    opening = grid_opening(encoder)
    assert encoder.to_text(grid).startswith(opening)
    assert opening == opening.rstrip()


@pytest.mark.parametrize("expression", ENCODERS)
@pytest.mark.parametrize("grid", [[[0]], [[1, 2, 3]], [[1, 2], [3, 1]], [[i % 10, 9 - i % 10] for i in range(12)]])
def test_a_grid_is_found_in_a_response_that_goes_on_or_starts_over(expression, grid):
    encoder = create_grid_encoder(expression)
    text = encoder.to_text(grid)
    for response in (
        text,
        text[len(grid_opening(encoder)) :],
        text + "\n\nThat is my answer.",
        f"The rule is simple.\n\n### Output\n\n{text}\nDone.",
        text.replace("\n", "\r\n"),
    ):
        assert parse_grid_from_response(response, encoder) == grid


@pytest.mark.parametrize("response", ["", "I do not know.", "```grid shape: 2x2\n1 01\n", "### Output"])
def test_a_response_without_a_grid_is_refused(response):
    with pytest.raises(ValueError, match="no grid"):
        parse_grid_from_response(response, DEFAULT)
