from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use a temporary cache, never the user's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("RWKV_PL_CACHE", str(folder))
    return folder
