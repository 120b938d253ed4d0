#!/usr/bin/env bash
# Adds SGLang's CPU side to an environment that already holds this package:
#   PYTHON=.venv/bin/python tools/install_sglang_cpu.sh
# About 0.5 GB. On a CUDA machine use `pip install 'megatron_vespo[gpu]'` instead.
set -euo pipefail
python=${PYTHON:-python3}

# --no-deps: its full requirements are CUDA builds. What SGLang still needs of them on a CPU, platform/sglang_cpu.py
# stands in for. torchvision stays away on purpose: a CUDA build beside a CPU torch breaks transformers for everyone.
"$python" -m pip install --no-deps sglang==0.5.21 compressed-tensors==0.18.0 xgrammar==0.2.7

# The part of its requirements that the server imports. torch, transformers and numpy stay as they are.
"$python" -m pip install \
    aiohttp==3.14.5 apache-tvm-ffi==0.1.11 dill==0.4.1 einops==0.8.2 gguf==0.19.0 interegular==0.3.3 ipython==9.18.1 \
    llguidance==1.9.1 loguru==0.7.3 msgspec==0.22.0 openai==2.6.1 orjson==3.13.0 \
    partial-json-parser==0.2.1.1.post7 pillow prometheus_client==0.26.0 psutil==7.2.2 pybase64==1.5.1 \
    python-multipart==0.0.34 pyzmq==27.3.0 requests scipy==1.17.1 sentencepiece==0.2.1 setproctitle==1.3.8 \
    soundfile==0.13.1 uvloop==0.23.0 watchfiles==1.3.0

"$python" - <<'CHECK'
import torch
import transformers

for module, version in ((torch, "2.13.0"), (transformers, "5.12.1")):
    assert module.__version__.split("+")[0] == version, f"{module.__name__} became {module.__version__}"
from transformers import Qwen3MoeForCausalLM  # noqa: F401  (fails where a torchvision for CUDA is installed)
CHECK
"$python" - <<'CHECK'
import torch

if torch.cuda.is_available():
    print("SGLang 0.5.21 is installed; CUDA is present, so megatron_vespo runs it as it is")
else:
    from megatron_vespo.platform.sglang_cpu import install

    install()
    import sglang.launch_server  # noqa: F401

    print("SGLang 0.5.21 is ready on this CPU: rollout.engine=sglang")
CHECK
