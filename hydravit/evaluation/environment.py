"""The names of the machine and of the commit that a result belongs to."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

# Runs write results, so changed results do not mean changed sources.
_SOURCES = ("--", ":/", ":(top,exclude)bench/results")


def cpu_name() -> str:
    """Return the processor's own name, with family and model where the system hides its number."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    facts: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    hidden = not any(character.isdigit() for character in facts["model name"])
    family = f" (family {facts.get('cpu family')}, model {facts.get('model')})" if hidden else ""
    return facts["model name"] + family


def commit() -> str | None:
    """Return the commit of this file's checkout, with "+" if tracked files differ; None if there is no checkout."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        # An installed copy may lie inside another repository's checkout, whose commit says nothing about it.
        subprocess.run([*git, "ls-files", "--error-unmatch", __file__], check=True, capture_output=True)
        done = subprocess.run([*git, "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno", *_SOURCES], check=True, capture_output=True)
        return done.stdout.strip() + ("+" if changed.stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None
