import os

os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # as cli.main sets it, before torch is loaded
