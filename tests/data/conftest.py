from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the user's own cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("RWKV_PL_CACHE", str(folder))
    return folder
