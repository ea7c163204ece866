"""From YAML to a run: the command line's options, checks of a recipe, memory."""
