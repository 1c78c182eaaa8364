"""`python -m fedmoe_ds.methods` prints docs/methods.md."""

from fedmoe_ds.methods.reference import methods_markdown
from fedmoe_ds.terminal import show

if __name__ == "__main__":
    show(methods_markdown().removesuffix("\n"))
