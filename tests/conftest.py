import os

os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # as cli.main sets it, before torch is loaded
# Networks this small gain nothing from a second thread, which on a busy machine only waits.
os.environ.setdefault("OMP_NUM_THREADS", "1")
