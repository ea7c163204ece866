"""Views of credit: the HTML page, the text view, and credit recomputed with another rule."""
