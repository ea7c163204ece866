"""Exports a policy as a Hugging Face model directory, with its configuration files and a model card."""
