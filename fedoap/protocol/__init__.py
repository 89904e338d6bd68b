"""The two protocol machines, free of sockets, files, clocks, randomness and threads.

`handle(event, now)` takes one event and the monotonic time in seconds and returns the effects that
the daemon has to carry out, in order. A machine never waits and never fails: an event that makes no
sense changes nothing and is answered by a `Refuse` with its reason.
"""
