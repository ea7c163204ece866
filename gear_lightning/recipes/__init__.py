"""Recipes: command-line options and YAML configs, checks of a recipe, and memory estimates."""
