"""Fixtures that all tests share."""

from pathlib import Path

import pytest

pytest_plugins = ["cluster_fixtures"]
SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and reference numbers; tests that need it are skipped without it."""
    if not SHARED.is_dir():
        pytest.skip("the folder ../shared with real data and reference numbers is not here")
    return SHARED
