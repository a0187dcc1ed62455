"""What README.md, docs/ and benchmarks/README.md name exists: links, files, flags, commands, dependencies."""

import argparse
import configparser
import functools
import importlib
import re
import shlex
from pathlib import Path

import pytest

import analyze_activations
import create_dataset_streams
import extract_activations
import prepare
from benchmarks.fleet import limits as fleet_limits
from benchmarks.fleet import simulation as fleet_simulation
from fleet import command_line
from launchers import ray_job
from qwen2_jax.families import FAMILIES
from qwen2_jax.taps import SITES

ROOT = Path(__file__).parents[2]
BENCHMARKS_PAGE = "benchmarks/README.md"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", ROOT / BENCHMARKS_PAGE, *(ROOT / "docs").glob("*.md")]
}
COMMANDS = {
    module.__name__: module.build_parser()
    for module in (extract_activations, create_dataset_streams, analyze_activations, prepare)
}
FOLDERS = "analysis|arc24|benchmarks|core|docs|fleet|launchers|parquet_cache|qwen2_jax|scripts|tests|torch_models"


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    """The flags of a parser and of its subcommands."""
    flags: set[str] = set()
    for action in parser._actions:
        flags.update(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            flags.update(*map(flags_of, action.choices.values()))
    return flags


OTHERS = [module.build_parser() for module in (command_line, fleet_limits, fleet_simulation, ray_job)]
# Of `ray job submit`.
RAYS_OWN = {"--address", "--working-dir"}


@functools.cache
def benchmark_parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of every benchmark, by its name. Skips the test without torch, which some benchmarks need."""
    pytest.importorskip("torch")
    folder = ROOT / "benchmarks"
    paths = [path for path in folder.rglob("*.py") if "def build_parser(" in path.read_text()]
    names = [".".join(path.relative_to(folder).with_suffix("").parts) for path in paths]
    modules = {name: importlib.import_module(f"benchmarks.{name}") for name in names}
    return {name.removesuffix(".benchmark"): module.build_parser() for name, module in modules.items()}


def shown_benchmarks(page: str) -> list[list[str]]:
    """As `shown_commands`, for `python -m benchmarks.NAME`: NAME and its arguments."""
    lines = re.sub(r"\\\n\s*", "", PAGES[page]).splitlines()
    found = (re.match(r" +(?:\w+=\S+ )*python -m benchmarks\.(.*)", line) for line in lines)
    return [shlex.split(match[1], comments=True) for match in found if match]


def shown_commands(page: str) -> list[list[str]]:
    """The argument lists of our commands in a page's indented blocks, their continued lines joined."""
    lines = re.sub(r"\\\n\s*", "", PAGES[page]).splitlines()
    return [shlex.split(line, comments=True) for line in lines if re.match(r" +python \w+\.py ", line)]


@pytest.mark.parametrize("page", PAGES)
def test_every_local_link_leads_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)", PAGES[page])
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (ROOT / page).parent.joinpath(target).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_exists(page):
    named = re.finditer(rf"(?<![\w./~-])(?:{FOLDERS})/(?:[\w./]*\w)?|`(\w+\.py)`", PAGES[page])
    paths = {match.group(1) or match.group(0) for match in named}
    beside = (ROOT / page).parent
    assert [path for path in sorted(paths) if not ((ROOT / path).exists() or (beside / path).exists())] == []


@pytest.mark.parametrize("page", PAGES)
def test_a_name_said_to_be_of_a_file_is_in_it(page):
    said = re.findall(r"`(\w+)`\s+(?:of|in)\s+`([\w/]+\.py)`", PAGES[page])
    assert [(name, path) for name, path in said if not re.search(rf"\b{name}\b", (ROOT / path).read_text())] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_is_one_of_a_command(page):
    benchmarks = benchmark_parsers().values() if page == BENCHMARKS_PAGE else ()
    known = set().union(*map(flags_of, [*COMMANDS.values(), *OTHERS, *benchmarks]))
    # After "=" it is a flag of XLA in XLA_FLAGS.
    assert set(re.findall(r"(?<![\w=-])--[a-z][\w-]*", PAGES[page])) - known - RAYS_OWN == set()


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_accepted_by_its_parser(page):
    for _, script, *arguments in shown_commands(page):
        assert COMMANDS[script.removesuffix(".py")].parse_args(arguments), "a refusal is a SystemExit with its reason"


@pytest.mark.parametrize("page", [page for page in PAGES if shown_benchmarks(page)])
def test_every_benchmark_is_accepted_by_its_parser(page):
    for name, *arguments in shown_benchmarks(page):
        assert benchmark_parsers()[name].parse_args(arguments), "a refusal is a SystemExit with its reason"


def test_the_page_of_the_benchmarks_shows_every_one_of_them():
    assert {name for name, *_ in shown_benchmarks(BENCHMARKS_PAGE)} == set(benchmark_parsers())


def test_the_readme_shows_every_command():
    assert {command[1].removesuffix(".py") for command in shown_commands("README.md")} == set(COMMANDS)


def test_the_table_of_models_has_every_family_and_that_of_sites_every_site():
    for page, header, names in (("docs/models.md", "| `model_type` |", FAMILIES), ("docs/sites.md", "| site |", SITES)):
        table = PAGES[page].partition(header)[2].partition("\n\n")[0]
        first_cells = re.findall(r"^\| (.*?) \|", table, re.MULTILINE)
        assert sorted(name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)) == sorted(names)


def test_every_dependency_has_its_reason():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lists = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    names = {re.split("[<>=!~;]", line)[0] for text in lists for line in text.split()}
    assert len(names) > 20
    assert [name for name in sorted(names) if f"`{name}`" not in PAGES["docs/dependencies.md"]] == []


def test_every_file_of_the_picture_exists():
    modules = re.findall(r'class="module"[^>]*>([^<]+)<', (ROOT / "docs/architecture.svg").read_text())
    paths = [path for text in modules for path in text.split()]
    assert len(paths) >= 12
    assert [path for path in paths if not (ROOT / path).exists()] == []
