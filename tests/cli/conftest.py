from __future__ import annotations

from pathlib import Path

import pytest
from tests.cli.tables import fit, numbers, text, write


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "data.csv", text(numbers()))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with a header's names; read only, copy it to damage it."""
    folder = tmp_path_factory.mktemp("model")
    data = write(folder / "data.csv", text(numbers()))
    assert fit(data, folder / "out", target="y") == 0
    return folder / "out"
