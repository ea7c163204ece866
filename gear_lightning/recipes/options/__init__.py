"""What the command line accepts, read from source files: help and checks that do not import torch."""
