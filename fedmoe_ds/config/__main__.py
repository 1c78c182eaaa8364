"""`python -m fedmoe_ds.config > docs/configuration.md`: write the reference of all keys."""

import sys

from fedmoe_ds.config.reference import config_schema_markdown

sys.stdout.write(config_schema_markdown())
