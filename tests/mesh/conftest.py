"""Tests on eight virtual devices of a CPU: `pytest tests/mesh`. A run of all tests has them in a process of their own
(`tests/model/test_sharding.py`), since the number of devices is fixed when JAX starts."""

import os

collect_ignore_glob = [] if "DSV32_MESH_TESTS" in os.environ else ["test_*.py"]
