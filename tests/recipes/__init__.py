"""Recipes that only tests use."""

from pathlib import Path

STAND_INS = str(Path(__file__).parent / "stand-ins.yaml")
