"""`python -m fedmoe_ds.methods` prints docs/methods.md."""

import sys

from fedmoe_ds.methods.reference import methods_markdown

if __name__ == "__main__":
    sys.stdout.write(methods_markdown())
