"""The tests' settings for the processes of a scenario: its workflows, and the DURABLE options that it chose."""

import json
import os

from tests.settings import *  # noqa: F403
from tests.settings import INSTALLED_APPS

# SCENARIO_APP: one that the scenario has written.
INSTALLED_APPS = [*INSTALLED_APPS, "tests.scenarios", *filter(None, [os.environ.get("SCENARIO_APP")])]
DURABLE = json.loads(os.environ.get("SCENARIO_DURABLE", "{}"))
