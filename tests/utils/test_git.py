import subprocess

import pytest

from atomdiff.utils.git import git_state


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A function that runs git in a new repository."""
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "somebody")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "somebody@example.com")

    def git(*command):
        return subprocess.run(
            ["git", *command], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init")
    git_state.cache_clear()
    return git


def test_the_state_is_the_commit_and_whether_files_differ_from_it(repository, tmp_path):
    script = tmp_path / "train.py"
    script.write_text("print(1)\n")
    assert git_state(script) is None  # not tracked
    repository("add", "train.py")
    repository("commit", "-m", "a script")
    (tmp_path / "new.txt").write_text("of no importance")
    git_state.cache_clear()
    assert git_state(script) == {"commit": repository("rev-parse", "HEAD"), "dirty": False}
    script.write_text("print(2)\n")
    git_state.cache_clear()
    assert git_state(script)["dirty"]


def test_files_in_no_repository_have_none(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    git_state.cache_clear()
    assert git_state(tmp_path / "train.py") is None
    monkeypatch.setenv("PATH", "")
    git_state.cache_clear()
    assert git_state(tmp_path / "train.py") is None
