"""``megatron-vespo convert to-megatron HF_DIR OUT`` as a script."""

import sys

from megatron_vespo.cli import main

sys.exit(main(["convert", "to-megatron", *sys.argv[1:]]))
