"""What a run has left, as one page for a browser: reading it, making the page, and the page's own files in `page/`."""
