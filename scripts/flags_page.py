"""Writes docs/flags.md from the parsers of the four commands: `python scripts/flags_page.py`."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import analyze_activations  # noqa: E402
import create_dataset_streams  # noqa: E402
import extract_activations  # noqa: E402
import prepare  # noqa: E402

PAGE = ROOT / "docs/flags.md"
_INTRODUCTION = """\
# Flags

Every flag of the four commands. This page is written by `python scripts/flags_page.py` from the parsers.
"""


def page() -> str:
    """The page: a section for each command, a table for each group of its flags."""
    sections = [_INTRODUCTION]
    for module in (extract_activations, create_dataset_streams, analyze_activations, prepare):
        sections.append(f"## {module.__name__}.py\n")
        sections += _sections(module.build_parser())
    return "\n".join(sections)


def _sections(parser: argparse.ArgumentParser, prefix: str = "") -> Iterator[str]:
    commands = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if commands:
        helps = {choice.dest: choice.help or "" for choice in commands[0]._choices_actions}
        for command, subparser in commands[0].choices.items():
            if any(isinstance(action, argparse._SubParsersAction) for action in subparser._actions):
                yield from _sections(subparser, f"{prefix}{command} ")
                continue
            yield f"### {prefix}{command}\n\n{_sentence(helps[command])}\n"
            yield _table(subparser._actions)
        return
    for group in parser._action_groups:
        if group.title in ("positional arguments", "options"):
            continue
        yield f"### {str(group.title).capitalize()}\n"
        yield _table(group._group_actions)
    if not any(group.title not in ("positional arguments", "options") for group in parser._action_groups):
        yield _table(parser._actions)


def _table(actions: list[argparse.Action]) -> str:
    rows = [_row(action) for action in actions if not _is_hidden(action)]
    return "\n".join(["| flag | values | meaning |", "|---|---|---|", *rows, ""])


def _is_hidden(action: argparse.Action) -> bool:
    """--help, and flags of other packages that absl knows once they are imported."""
    return isinstance(action, argparse._HelpAction) or "==SUPPRESS==" in str(action.help)


def _row(action: argparse.Action) -> str:
    name = action.option_strings[-1] if action.option_strings else action.dest
    return f"| `{name}` | {_values(action)} | {_cell((action.help or '') % {'default': action.default})} |"


def _values(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    values = ", ".join(f"`{choice}`" for choice in action.choices) if action.choices else _kind(action)
    return f"one or several: {values}" if action.nargs == "+" else values


def _kind(action: argparse.Action) -> str:
    kinds: dict[object, str] = {int: "whole number", float: "number"}
    return kinds.get(action.type, str(action.metavar or "text").lower())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


if __name__ == "__main__":
    PAGE.write_text(page())
