"""What the file of a command adds its parser to."""

from __future__ import annotations

import argparse
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""argparse has no public name for what ``add_subparsers`` returns."""
