"""What an exported model directory holds beside its weights."""
