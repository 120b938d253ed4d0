"""``megatron-vespo convert to-hf MEGATRON_DIR OUT`` as a script."""

import sys

from megatron_vespo.cli import main

sys.exit(main(["convert", "to-hf", *sys.argv[1:]]))
