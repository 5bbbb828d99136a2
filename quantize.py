"""Quantize the experts of a mixture-of-experts checkpoint: `python quantize.py --model … --output …`.

The same as `kbvq quantize …`.
"""

import sys

from kbvq.cli import main

if __name__ == "__main__":
    sys.exit(main(["quantize", *sys.argv[1:]]))
