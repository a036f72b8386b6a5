"""A small tiktoken vocabulary, trained on the spot: the file format of the published one, a few hundred tokens.

Byte-level BPE on the sample below: the 256 bytes are ranks 0-255, then each rank is the pair of tokens that was most
frequent when it was made. One line of the file is `base64(token bytes) rank`. The trainer is plain and slow, which is
no matter for a sample of one page; it imports nothing but the standard library.
"""

import base64
import itertools
import re
from collections import Counter
from pathlib import Path

SAMPLE = """
Which one is bigger, 9.11 or 9.9? Think carefully. The user asks which of the two numbers is bigger. Compare the parts
before the point: both are 9. Then compare the parts after the point: 0.11 and 0.90. Since 0.90 is more than 0.11, the
bigger number is 9.9. The answer is 9.9, because 9.90 is greater than 9.11. Tell me three random numbers. I will list
five numbers and tell you the first three. What are the other two numbers that you have in mind? Describe this image in
detail. There is a red circle on the left, a blue square in the middle and a green triangle on the right. The circle
moves from the left to the right. What is the weather like in Beijing today? Let me call the tool to get the weather.
You are Kimi, an AI assistant created by Moonshot AI. Hello! How can I help you today? Thank you, that is all for now.
哪个更大，9.11 还是 9.9？请仔细想一想。用户问这两个数字哪个更大。先比较小数点前面的部分，都是 9。再比较小数点后面的部分，0.90 大于 0.11。
所以 9.9 更大。请告诉我三个随机数字。你心里想的另外两个数字是什么？今天北京的天气怎么样？你好，我是 Kimi，很高兴为你服务。谢谢你的帮助。
def compare(first, second):
    if first > second:
        return first
    return second

class Number:
    def __init__(self, value):
        self.value = value

    def __repr__(self):
        return f"Number({self.value})"

import json
for index, item in enumerate(items):
    print(index, json.dumps({"name": item.name, "value": item.value}))
{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Beijing"}}}
"""


def train_merges(text: str, num_merges: int) -> list[bytes]:
    """The tokens made by up to `num_merges` merges, in order; fewer if no pair occurs twice any more."""
    # Words with one leading space, digits and punctuation apart, as the published pattern splits them, roughly.
    pieces = Counter(re.findall(r" ?[^\W\d_]+|\d{1,3}| ?[^\s\w]+|\s+|_", text))
    words = {tuple(bytes([b]) for b in piece.encode()): count for piece, count in pieces.items()}
    merged: list[bytes] = []
    while len(merged) < num_merges:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        # The smaller bytes win a tie, so that every machine trains the same vocabulary.
        best, frequency = min(pairs.items(), key=lambda item: (-item[1], item[0]), default=((b"", b""), 0))
        if frequency < 2:
            break
        merged.append(b"".join(best))
        words = {merge(word, best): count for word, count in words.items()}
    return merged


def merge(word: tuple[bytes, ...], pair: tuple[bytes, bytes]) -> tuple[bytes, ...]:
    """Joins each occurrence of `pair` in a word, from the left."""
    output: list[bytes] = []
    for token in word:
        if output and (output[-1], token) == pair:
            output[-1] += token
        else:
            output.append(token)
    return tuple(output)


def write_tiny_tiktoken(path: str | Path, num_merges: int = 600, text: str = SAMPLE) -> int:
    """Writes the file and returns the number of ranks, after which the 256 reserved ids begin."""
    ranks = dict.fromkeys([bytes([b]) for b in range(256)] + train_merges(text, num_merges))
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks))
    Path(path).write_text("".join(lines), encoding="ascii")
    return len(ranks)
