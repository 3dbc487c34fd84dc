"""`python -m jaxembed.train`: the same as `jaxembed train`."""

import sys

from jaxembed.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
