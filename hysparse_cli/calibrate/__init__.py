"""What a dense model does on a little text: the text, and a look at each attention layer."""
