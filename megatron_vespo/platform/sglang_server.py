"""SGLang's server as this project starts it, on a GPU and (by sglang_cpu.py) on a CPU.

``python -m megatron_vespo.platform.sglang_server FLAGS``, with SGLang's own flags. The one difference from
``sglang.launch_server`` is the key: SGLang writes its arguments to its log, so a key among them would be there to read.
Here it comes by the environment, and SGLang's own check of it is put in front of the application.
"""

from __future__ import annotations

import os
import sys
from typing import Any

KEY_VARIABLE = "MEGATRON_VESPO_ENGINE_KEY"
"""Environment variable by which an engine gets its key: a command line is everyone's to read."""


def want_key() -> None:
    """Where the environment holds a key, answer only requests that bear it (/health is open, as SGLang has it)."""
    key = os.environ.pop(KEY_VARIABLE, None)
    if key is None:
        return
    import requests
    from sglang.srt.entrypoints import http_server
    from sglang.srt.utils.auth import add_api_key_middleware

    def freeze_gc(server_args: Any) -> None:
        """What SGLang asks of itself once it serves; it would ask without the key that it does not know of."""
        headers = {"Authorization": f"Bearer {key}"}
        requests.post(f"{server_args.url()}/freeze_gc", headers=headers, timeout=10).raise_for_status()

    http_server._freeze_gc_after_server_warmup = freeze_gc
    add_api_key_middleware(http_server.app, api_key=key, admin_api_key=None)


def main() -> None:
    """``sglang.launch_server``'s main."""
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    want_key()
    try:
        run_server(prepare_server_args(sys.argv[1:]))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
