"""The machine and the software a result belongs to."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

# Results are written by runs; they are not what ran.
_SOURCES = ("--", ":/", ":(top,exclude)bench/results")


def cpu_name() -> str:
    """As the processor calls itself; with family and model where the system hides the rest."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    hidden = not any(character.isdigit() for character in facts["model name"])
    family = f" (family {facts.get('cpu family')}, model {facts.get('model')})" if hidden else ""
    return facts["model name"] + family


def commit() -> str | None:
    """Of the checkout this file lies in, with "+" where tracked files differ; None where it is installed elsewhere."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        # Only our own repository's: an installed copy may lie inside someone else's checkout.
        subprocess.run([*git, "ls-files", "--error-unmatch", __file__], check=True, capture_output=True)
        done = subprocess.run([*git, "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno", *_SOURCES], check=True, capture_output=True)
        return done.stdout.strip() + ("+" if changed.stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None
