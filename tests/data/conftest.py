from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the user's own cache."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("RWKV_PL_CACHE", str(folder))
    return folder
