"""One self-contained HTML page: curves, tables and pictures of what a federation did."""
