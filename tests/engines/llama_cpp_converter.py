"""Runs llama.cpp's own converter on a folder: python llama_cpp_converter.py SOURCES FOLDER [its arguments].

Its one change: the converter recognises a vocabulary by a hash of ids, which a small vocabulary of its own cannot have, so
it is told that our tokenizer is the pre-tokenizer "kimi-k2". Another tokenizer, which transformers 5 makes of the same folder
without remote code, stays unknown as its hash would be, or the file would have no merges.
"""

import sys
from pathlib import Path

root = Path(sys.argv[1])
sys.path[:0] = [str(root), str(root / "gguf-py")]

import conversion.base  # noqa: E402
import convert_hf_to_gguf  # noqa: E402


def recognise(self, tokenizer):
    if not hasattr(tokenizer, "special_tokens"):
        raise NotImplementedError("not the remote code's tokenizer")
    return "kimi-k2"


conversion.base.TextModel.get_vocab_base_pre = recognise
sys.argv = ["convert_hf_to_gguf.py", *sys.argv[2:]]
convert_hf_to_gguf.main()
