"""One coordinator and a node per site as real processes on this machine, with real keys."""
