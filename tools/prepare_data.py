"""``megatron-vespo prepare-data LAYOUT FILE ... --out OUT.jsonl`` as a script."""

import sys

from megatron_vespo.cli import main

sys.exit(main(["prepare-data", *sys.argv[1:]]))
