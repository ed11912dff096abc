"""Registers the test plugins. Under tests/ there are no packages, so their folder goes on the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "tests" / "plugins"))

pytest_plugins = ["factory_services"]
