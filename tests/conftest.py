"""Two virtual CPU devices, so that sharded parameters are tested on every machine."""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
