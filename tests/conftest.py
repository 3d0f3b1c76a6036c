"""What every test file shares: the scripts and `common` are importable, and the rendered shapes are cached once."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A --root that all tests share, so that `shapes` is rendered once."""
    return tmp_path_factory.mktemp("root")
