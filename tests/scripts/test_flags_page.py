import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_of_flags_is_what_the_parsers_say():
    spec = importlib.util.spec_from_file_location("flags_page", ROOT / "scripts/flags_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page(), "run python scripts/flags_page.py"
