"""`python -m fedmoe_ds.config > docs/configuration.md`: write the reference of all keys."""

from fedmoe_ds.config.reference import config_schema_markdown
from fedmoe_ds.terminal import show

show(config_schema_markdown().removesuffix("\n"))
