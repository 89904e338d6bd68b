"""A hospital's daemon: it keeps the link to the coordinator and runs training in a process of its own."""
