"""The commands of the command line: one file each, with a function ``NAME_command`` that takes the arguments."""
