"""Studies: many federations in one process each, and the tables and the page that come of them."""
