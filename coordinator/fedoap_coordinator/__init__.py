"""The federation's coordinator: a ZeroMQ daemon, its ledger and its command line; it never imports torch."""
