"""What every test runs under."""

import os

# tiny tensors gain nothing from threads, and threads that wait for each other by spinning starve on a busy machine
os.environ.setdefault("OMP_NUM_THREADS", "1")
