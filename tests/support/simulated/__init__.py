"""A whole federation in one thread: real protocol machines; a world of chance around them."""
