"""The verbs of the command line: one file each, with a function that gets the arguments."""
