"""Where credit went: the HTML page, the text view, and what another rule would have made of it."""
