"""What to train: YAML to a typed, frozen `Recipe`, and block patterns. Imports no torch."""

from megacpp_stp.recipe.load import find_recipe, list_recipes, load_recipe, restore_recipe
from megacpp_stp.recipe.pattern import Block, Pattern, PatternError, parse_pattern
from megacpp_stp.recipe.schema import Recipe

__all__ = [
    "Block",
    "Pattern",
    "PatternError",
    "Recipe",
    "find_recipe",
    "list_recipes",
    "load_recipe",
    "parse_pattern",
    "restore_recipe",
]
