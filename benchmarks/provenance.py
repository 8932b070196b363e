"""Which sources were measured."""

import subprocess
from pathlib import Path


def git(*words: str) -> str:
    """What git says in this checkout; nothing where there is no git, or no checkout."""
    try:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def commit(*words: str) -> str:
    """Short name of the commit, or "unknown"; "-dirty" where `git status` with these words has something to say."""
    changed = git("status", "--porcelain", *words)
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else "")
