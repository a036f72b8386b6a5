"""Text to token ids and back, and conversations to text, for Kimi K2.7 Code.

The vocabulary is byte-level BPE in one file, `tiktoken.model`: a line is `base64(token bytes) rank`, ranks count from
0, and a token's rank is its id. All 256 single bytes have a rank, so any text can be encoded. After the `base` ranks
of the file (163,584 in the published one) come 256 reserved ids, base ... base + 255, that no merge can make:

    offset  name                       offset  name
    0       [BOS]                      11-15   tool call markers          (kept by skip_special_tokens)
    1       [EOS]                      17      <|im_middle|>              role name | body
    2       <|im_end|>  ends a turn    18-21   <|media_begin|> ... <|media_pad|>
    3, 4    <|im_user|>, <|im_assistant|>      22, 23  <think>, </think>  (kept by skip_special_tokens)
    10      <|im_system|>              254     [UNK], 255 [PAD]; all others <|reserved_token_{id}|>

Encoding finds the reserved names ("markers") first and runs BPE on the plain text between them, straight to ids. Very
long plain text is cut into slices (see `split_long_text`), never inside a marker, since markers are found before. Text
that must not be able to open a turn is encoded with `split_special_tokens=True`, which recognises no marker.

Decoding joins the bytes of the tokens and reads them as UTF-8. A token may end inside a character, so a stream is
decoded from its accumulated ids (or from `tokenizer.model.decode_single_token_bytes` and an incremental decoder), not
id by id.

Batches are padded on the left, as `generate` needs: the prompt has to end where the answer begins.
"""

import base64
import codecs
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tiktoken
from transformers import AddedToken, PreTrainedTokenizer
from transformers.utils import to_py_obj

from .kimi_messages import (
    field_to_continue,
    map_strings,
    normalize_messages,
    normalize_tool_ids,
    refuse_to_stop_thinking,
)
from .kimi_output import KimiCompletionStream, parse_completion
from .kimi_schema import CallCheck, validate_tool_call
from .kimi_streamer import KimiTextStreamer

# The first two are looked up here by renderers outside transformers.
from .kimi_tools import (  # noqa: F401
    deep_sort_dict,
    encode_tools_to_typescript_style,
    normalize_tools,
    render_tool_declaration,
)

VOCAB_FILE = "tiktoken.model"
NUM_RESERVED = 256

# Offset from the first reserved id -> name; the other offsets up to 255 are named after their absolute id.
# fmt: off
NAMED_TOKENS = {
    0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>", 6: "<|start_header_id|>",
    7: "<|end_header_id|>", 9: "[EOT]", 10: "<|im_system|>", 11: "<|tool_calls_section_begin|>",
    12: "<|tool_calls_section_end|>", 13: "<|tool_call_begin|>", 14: "<|tool_call_argument_begin|>",
    15: "<|tool_call_end|>", 17: "<|im_middle|>", 18: "<|media_begin|>", 19: "<|media_content|>",
    20: "<|media_end|>", 21: "<|media_pad|>", 22: "<think>", 23: "</think>", 254: "[UNK]", 255: "[PAD]",
}
# fmt: on
# Not flagged special: `decode(skip_special_tokens=True)` must keep the text that reasoning and tool parsers read.
KEPT_MARKERS = {11, 12, 13, 14, 15, 22, 23}
ROLES = {"bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]", "pad_token": "[PAD]"}

# Pieces that BPE never merges across, tried in this order: Han runs; words, with at most one leading sign (mostly a
# space) and an English contraction; up to three digits; punctuation with its newlines; whitespace, whose last character
# is left for the next word. `&&` intersects character classes, in the syntax of the Rust engine inside tiktoken.
PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
MAX_BLOCK = 400_000  # characters encoded in one call
SHORT_TEXT = 4_000  # characters
MAX_RUN = 25_000  # characters in a row that are all whitespace, or all not
RUN = re.compile(r"\s+|\S+")  # \s is str.isspace() for every character

# Each byte as one printable character, so that a token is a string: printable Latin-1 stands for itself, the other 68
# bytes follow from U+0100 on (the convention of GPT-2's vocabulary files: a leading space shows as Ġ).
_printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_others = iter(range(0x100, 0x200))
BYTE_CHARACTERS = "".join(chr(byte if byte in _printable else next(_others)) for byte in range(256))

UNKNOWN_ID = "{!r} is not a token id: the vocabulary has {} tokens, counted from 0"

# Written around each marker name in a user's text. Unicode reserves these two for internal use; in a user's text they
# are wrapped themselves, so nothing that a user types can be taken for a wrapper.
USER_START, USER_END = "\ufdd0", "\ufdd1"
WORD_JOINER = "\u2060"


class MissingVocabularyError(FileNotFoundError):
    """`tiktoken.model` is missing."""


class VocabularyError(ValueError):
    """`tiktoken.model` is invalid, or `tokenizer_config.json` contradicts it."""


def read_ranks(vocab_file: str) -> dict[bytes, int]:
    """Token bytes -> rank, in rank order. Raises unless the ranks are 0, 1, 2, ... and every single byte has one."""
    path = Path(vocab_file)
    if not path.is_file():
        target = path.parent if path.parent.is_dir() else "."
        raise MissingVocabularyError(
            f"{VOCAB_FILE} is missing: looked for {vocab_file!r}. The file holds the vocabulary and comes with the "
            f"published weights. Download it with\n"
            f"    hf download moonshotai/Kimi-K2.7-Code {VOCAB_FILE} --local-dir {target}"
        )
    data = path.read_bytes()
    if data.startswith(b"version https://git-lfs"):
        raise VocabularyError(
            f"{path} is a Git LFS pointer of {len(data)} bytes, not the vocabulary. Run `git lfs pull` where it was "
            f"cloned, or `hf download moonshotai/Kimi-K2.7-Code {VOCAB_FILE} --local-dir {path.parent}`."
        )
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            encoded, digits = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(digits)
        except ValueError:
            raise VocabularyError(
                f"{path}, line {number}: expected `base64 rank`, found {line[:80]!r}"
            ) from None
        if token in ranks:
            raise VocabularyError(
                f"{path}, line {number}: token {token!r} has rank {ranks[token]} and rank {rank}"
            )
        ranks[token] = rank
    ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
    for expected, (token, rank) in enumerate(ranks.items()):
        if rank != expected:  # a gap would shift every reserved id
            raise VocabularyError(
                f"{path}: rank {expected} should come next, but token {token!r} has rank {rank}"
            )
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise VocabularyError(
            f"{path}: {len(missing)} of the 256 single bytes have no rank, e.g. byte {missing[0]}"
        )
    return ranks


def split_long_text(text: str) -> Iterator[str]:
    """Slices of plain text that the BPE engine can take, cut where the published tokenizer cuts.

    The pattern has a lookahead, so it runs in a backtracking engine, whose stack overflows on a million spaces. Hence
    blocks of 400,000 characters, and inside a block a cut after each 25,000 characters of one run, where a run is all
    whitespace or has none. Ids differ from those of uncut text only at these cuts.
    """
    for start in range(0, len(text), MAX_BLOCK):
        block = text[start : start + MAX_BLOCK]
        cut = 0
        for run in RUN.finditer(block) if may_have_long_run(block) else ():
            for position in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
                yield block[cut:position]
                cut = position
        yield block[cut:]


def may_have_long_run(text: str) -> bool:
    """False only if no run is longer than MAX_RUN. Such a run covers a whole step between points that are half of MAX_RUN
    apart, so it is enough to look at the runs from these points, which takes little time in ordinary text."""
    step = MAX_RUN // 2
    runs = (next(RUN.finditer(text, position)) for position in range(0, len(text) - step, step))
    return any(run.end() - run.start() >= step for run in runs)


def alternation(names: Iterable[str]) -> str:
    """A regular expression for any of `names`, the longest first, with common prefixes written once.

    Prefixes matter: `re` tries the alternatives one by one, so 256 plain ones make each `<` of an HTML page cost 256
    attempts (7 million characters per second; with shared prefixes 150 million).
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name[:1], []).append(name)
    optional = "?" if groups.pop("", None) else ""
    branches = []
    for group in groups.values():
        prefix = os.path.commonprefix(group)  # noqa: RUF071 (characters are meant)
        branches.append(re.escape(prefix) + alternation(name[len(prefix) :] for name in group))
    return f"(?:{'|'.join(branches)}){optional}" if branches else ""


class TikTokenTokenizer(PreTrainedTokenizer):
    """Slow in transformers' terms (`is_fast` is False), though the work is done by tiktoken.

    Nothing is ever added around a text: no BOS, no EOS; a pair is plain concatenation. `model` is the
    `tiktoken.Encoding`, `special_tokens` maps all 256 reserved names to ids, and `encoder` and `decoder` map token
    strings to ids and back; converters of other engines read these. `added_tokens_decoder` comes from
    `tokenizer_config.json`: it may flag the reserved tokens differently and name tokens that a user added, but it must
    agree with `tiktoken.model` on ids.
    """

    vocab_files_names = {"vocab_file": VOCAB_FILE}  # noqa: RUF012 (the name and type that transformers reads)
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    padding_side = "left"
    pat_str = PATTERN
    num_reserved_special_tokens = NUM_RESERVED

    def __init__(
        self,
        vocab_file: str | None = None,
        added_tokens_decoder: Mapping[int, AddedToken] | None = None,
        **kwargs: Any,
    ):
        self.vocab_file = vocab_file or os.path.join(kwargs.get("name_or_path", ""), VOCAB_FILE)
        ranks = read_ranks(self.vocab_file)
        base = len(ranks)
        names = [NAMED_TOKENS.get(i, f"<|reserved_token_{base + i}|>") for i in range(NUM_RESERVED)]
        self.special_tokens = {name: base + i for i, name in enumerate(names)}
        self.model = tiktoken.Encoding(
            name=VOCAB_FILE, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=self.special_tokens
        )
        self.n_words = base + NUM_RESERVED
        self.byte_encoder = dict(enumerate(BYTE_CHARACTERS))
        self.byte_decoder = {character: byte for byte, character in self.byte_encoder.items()}
        strings = [codecs.charmap_decode(token, "strict", BYTE_CHARACTERS)[0] for token in ranks] + names
        self.encoder = {string: i for i, string in enumerate(strings)}
        self.decoder = dict(enumerate(strings))

        for role, name in ROLES.items():
            kwargs[role] = kwargs.get(role) or name
        # transformers 5 saves this list as extra_special_tokens, under which 4.57 saves a dict of further roles.
        if extra := kwargs.pop("extra_special_tokens", None):
            kwargs["extra_special_tokens" if isinstance(extra, Mapping) else "additional_special_tokens"] = (
                extra
            )
        others = [n for i, n in NAMED_TOKENS.items() if i not in KEPT_MARKERS and n not in ROLES.values()]
        if kwargs.get("additional_special_tokens") is None:
            kwargs["additional_special_tokens"] = others
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        added_tokens = self._checked_added_tokens(added_tokens_decoder or {})
        super().__init__(added_tokens_decoder=added_tokens, **kwargs)
        self.bos_id, self.eos_id = self.bos_token_id, self.eos_token_id
        self.unk_id, self.pad_id = self.unk_token_id, self.pad_token_id

    def _checked_added_tokens(self, given: Mapping[int, AddedToken]) -> dict[int, AddedToken]:
        """The 23 named tokens, updated by what tokenizer_config.json says once that agrees with tiktoken.model."""
        tokens = {
            self.special_tokens[name]: AddedToken(name, normalized=False, special=offset not in KEPT_MARKERS)
            for offset, name in NAMED_TOKENS.items()
        }
        for key, token in given.items():
            index, token = int(key), AddedToken(**token) if isinstance(token, Mapping) else token
            name = str(token)
            if self.encoder.get(name, index) != index or self.decoder.get(index, name) != name:
                raise VocabularyError(
                    f"tokenizer_config.json gives {name!r} the id {index}, but {VOCAB_FILE} has "
                    f"{self.n_words - NUM_RESERVED} ranks, so {name!r} has the id {self.encoder.get(name)} and "
                    f"{index} is {self.decoder.get(index)!r}. The two files belong to different checkpoints."
                )
            tokens[index] = token
        return dict(sorted(tokens.items()))

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "TikTokenTokenizer":
        try:
            return super().from_pretrained(*args, **kwargs)
        except (OSError, ImportError) as error:
            # transformers hides what a constructor raises: an OSError behind "Unable to load vocabulary from file",
            # and 4.57, where protobuf is not installed, everything behind "requires the protobuf library".
            if isinstance(error.__context__, (MissingVocabularyError, VocabularyError)):
                raise error.__context__ from None
            raise

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Copies tiktoken.model byte for byte."""
        target = Path(save_directory) / f"{filename_prefix + '-' if filename_prefix else ''}{VOCAB_FILE}"
        if Path(self.vocab_file).resolve() != target.resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)

    # Vocabulary

    @property
    def vocab_size(self) -> int:
        """Ranks and reserved ids, without tokens that a user added; `len(tokenizer)` counts those too."""
        return self.n_words

    def get_vocab(self) -> dict[str, int]:
        return {**self.encoder, **self._added_tokens_encoder}

    def _update_total_vocab_size(self) -> None:
        """transformers calls this whenever tokens were added: the one place to refresh what is derived from them."""
        super()._update_total_vocab_size()
        added = self._added_tokens_encoder
        # A user may register a token that has a rank. Its name is a marker only if its bytes are the name: "Ġthe" is the
        # string of the token " the", and the text "Ġthe" must not be encoded as that token.
        self._marker_ids = {**self.special_tokens}
        self._marker_ids.update((n, i) for n, i in added.items() if self._bytes_of_id(i) == n.encode())
        self._marker_pattern = re.compile(alternation(self._marker_ids))
        self._greedy_markers = {
            token.content: token
            for token in self._added_tokens_decoder.values()
            if token.lstrip or token.rstrip or token.single_word
        }

    def _convert_token_to_id(self, token: str) -> int:
        return self.encoder.get(token, self.unk_token_id)

    def _convert_id_to_token(self, index: int) -> str:
        if index in self.decoder:
            return self.decoder[index]
        if index in self._added_tokens_decoder:
            return self._added_tokens_decoder[index].content
        raise ValueError(UNKNOWN_ID.format(index, len(self)))

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        ids = to_py_obj(ids)
        if isinstance(ids, int):
            return self._convert_id_to_token(ids)
        skipped = self._skipped_ids() if skip_special_tokens else ()
        return [self._convert_id_to_token(i) for i in ids if i not in skipped]

    def _skipped_ids(self) -> set[int]:
        """Ids flagged special. Computed for each call, since users add special tokens; reserved ids without a name of
        their own are not among them."""
        flagged = {i for i, token in self._added_tokens_decoder.items() if token.special}
        return flagged.union(self.all_special_ids)

    # Text to ids

    def encode(self, text: Any, *args: Any, allow_special_tokens: bool = True, **kwargs: Any) -> list[int]:
        """Ids of a text; the same ones with any keywords, and the same as `tokenizer(text).input_ids`.

        `split_special_tokens=True` or `allow_special_tokens=False` encodes marker names as plain text.
        """
        if not allow_special_tokens:
            kwargs["split_special_tokens"] = True
        only_known = not args and kwargs.keys() <= {"split_special_tokens", "add_special_tokens"}
        if isinstance(text, str) and only_known:
            return self._encode_text(text, kwargs.get("split_special_tokens"))
        return super().encode(text, *args, **kwargs)

    def tokenize(self, text: str, *args: Any, **kwargs: Any) -> list[str]:
        split = True if not kwargs.get("allow_special_tokens", True) else kwargs.get("split_special_tokens")
        return self.convert_ids_to_tokens(self._encode_text(text, split))

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return self.convert_ids_to_tokens(self._encode_plain(text))

    def _encode_text(self, text: str, split_special_tokens: bool | None = None) -> list[int]:
        if self.split_special_tokens if split_special_tokens is None else split_special_tokens:
            return self._encode_plain(text)
        ids: list[int] = []
        for part in self._split_at_markers(text):
            # tiktoken can find the reserved names too. It is faster at that, but takes longer to list them than to
            # encode a short text, and has neither the tokens that a user added nor the limits of `split_long_text`.
            at_once = SHORT_TEXT < len(part) <= MAX_BLOCK and len(self._marker_ids) == NUM_RESERVED
            if at_once and not may_have_long_run(part):
                ids += self.model.encode(part, allowed_special="all")
            else:
                ids += self._encode_between_markers(part)
        return ids

    def _split_at_markers(self, text: str) -> Iterator[str]:
        """Parts of up to MAX_BLOCK characters, cut before a marker; a longer one where there is none to cut at."""
        start = 0
        while len(text) - start > MAX_BLOCK:
            match = self._marker_pattern.search(text, start + MAX_BLOCK // 2, start + MAX_BLOCK)
            if match is None or len(self._marker_ids) > NUM_RESERVED:
                break
            yield text[start : match.start()]
            start = match.start()
        yield text[start:]

    def _encode_between_markers(self, text: str) -> list[int]:
        ids: list[int] = []
        position = 0
        for start, end, marker_id in self._find_markers(text):
            if position < start:
                ids += self._encode_plain(text[position:start])
            ids.append(marker_id)
            position = end
        ids += self._encode_plain(text[position:])
        return ids

    def _find_markers(self, text: str) -> Iterator[tuple[int, int, int]]:
        """(start, end, id) of each marker, in order. Tokens that a user added may include the whitespace around them."""
        position = 0
        for match in self._marker_pattern.finditer(text):
            name = match.group()
            start, end = match.span()
            if token := self._greedy_markers.get(name):
                neighbours = text[max(start - 1, 0) : start] + text[end : end + 1]
                if token.single_word and neighbours.strip(" "):
                    continue
                if token.lstrip:
                    start = position + len(text[position:start].rstrip())
                if token.rstrip:
                    end = len(text) - len(text[end:].lstrip())
            yield start, end, self._marker_ids[name]
            position = end

    def _encode_plain(self, text: str) -> list[int]:
        """BPE alone: no marker is recognised, so no id is a reserved one."""
        if len(text) <= MAX_RUN:
            return self.model.encode_ordinary(text)
        ids: list[int] = []
        for piece in split_long_text(text):
            ids += self.model.encode_ordinary(piece)
        return ids

    def _encode_marked(self, text: str) -> list[int]:
        """Ids of a rendered chat; markers that `mark_user_text` wrapped are encoded as plain text."""
        pieces = re.split(f"{USER_START}({self._wrapped_names()}){USER_END}", text)
        encoders = (self._encode_text, self._encode_plain)  # odd pieces are what the group matched
        return [i for n, piece in enumerate(pieces) for i in encoders[n % 2](piece)]

    def _wrapped_names(self) -> str:
        return f"{self._marker_pattern.pattern}|[{USER_START}{USER_END}]"

    def mark_user_text(self, value: Any, names: Iterable[str] = ()) -> Any:
        """A copy of messages or options in which each marker name in a string is wrapped, in dict keys too, since a
        template may write them as JSON. `names`: further strings to wrap.

        This is what keeps a user's text from becoming control tokens; `_encode_marked` is its other half.
        """
        wrap = re.compile("|".join([*map(re.escape, names), self._wrapped_names()])).sub
        return map_strings(value, lambda text: wrap(rf"{USER_START}\g<0>{USER_END}", text))

    def sanitize_messages(self, messages: Iterable[Any]) -> list[dict[str, Any]]:
        """Normalised messages without any marker name, for engines that render to a string and encode that. See
        `sanitize_text` for what changes. Not needed for `apply_chat_template(tokenize=True)`, which keeps the text.
        """
        return self.sanitize_text(normalize_messages(messages))

    def sanitize_text(self, value: Any) -> Any:
        """A copy of a string, or of tools and other nested data, in which U+2060, the invisible word joiner, follows the
        first character of each marker name. A reader sees the same text, the model one more character.
        """
        split = self._marker_pattern.sub
        return map_strings(value, lambda text: split(lambda m: f"{m[0][0]}{WORD_JOINER}{m[0][1:]}", text))

    def _ids_of_input(self, text: Any, options: Mapping[str, Any]) -> Any:
        """A text, or a list of words, as ids; anything else unchanged. transformers takes a list of ids as encoded
        already, which avoids token strings. It does not take an empty list, hence the empty text."""
        split = options.get("split_special_tokens")
        if isinstance(text, str):
            if options.get("sanitize_control_tokens"):  # 5.x has marked the text itself and encodes it itself
                return text
            return (
                self._encode_marked(text) if options.get("marked") else self._encode_text(text, split)
            ) or ""
        if text and options.get("is_split_into_words") and all(isinstance(word, str) for word in text):
            return [i for word in text for i in self._encode_text(word, split)] or ""
        return text

    def _encode_plus(self, text: Any, text_pair: Any = None, *args: Any, **kwargs: Any) -> Any:
        """One input on both major versions; on 5.x also a batch, whose items are passed here one by one."""
        if not kwargs.pop("allow_special_tokens", True):
            kwargs["split_special_tokens"] = True
        first, second = (self._ids_of_input(given, kwargs) for given in (text, text_pair))
        return super()._encode_plus(first, second, *args, **kwargs)

    def _batch_encode_plus(self, batch_text_or_text_pairs: Iterable[Any], *args: Any, **kwargs: Any) -> Any:
        """A batch on 4.57, which takes every item that is a list for a pair."""
        if not kwargs.pop("allow_special_tokens", True):
            kwargs["split_special_tokens"] = True
        words = kwargs.get("is_split_into_words")
        pairs = []
        for item in batch_text_or_text_pairs:
            single = isinstance(item, str) or (words and all(isinstance(word, str) for word in item))
            texts = (item, None) if single else item
            pairs.append(tuple(self._ids_of_input(text, kwargs) for text in texts))
        return super()._batch_encode_plus(pairs, *args, **{**kwargs, "is_split_into_words": False})

    # Ids to text

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, *args: Any, **kwargs: Any) -> Any:
        """Text of an id, of a list, an array or a tensor of ids; a list of texts for a batch.

        The bytes of all tokens are joined before they are read as UTF-8; invalid UTF-8, such as the first half of a
        character, becomes U+FFFD. Keywords that add or remove spaces have no effect, since they would change code.
        """
        plain = isinstance(token_ids, list) and token_ids and type(token_ids[0]) is int
        ids = token_ids if plain else to_py_obj(token_ids)  # to_py_obj copies a list through numpy
        if isinstance(ids, (list, tuple)) and ids and isinstance(ids[0], (list, tuple)):
            return [self._decode(row, skip_special_tokens) for row in ids]
        return self._decode(ids, skip_special_tokens)

    def _decode(self, token_ids: Any, skip_special_tokens: bool = False, *args: Any, **kwargs: Any) -> str:
        ids = token_ids if isinstance(token_ids, (list, tuple)) else [token_ids]
        if skip_special_tokens:
            skipped = self._skipped_ids()
            ids = [i for i in ids if i not in skipped]
        try:
            return self.model.decode(ids)
        except (KeyError, OverflowError, TypeError):  # an id that a user added, or something that is no id
            return b"".join(map(self._bytes_of_id, ids)).decode("utf-8", errors="replace")

    def _bytes_of_id(self, index: int) -> bytes:
        if index in self.decoder:
            return self.model.decode_single_token_bytes(index)
        return self._convert_id_to_token(index).encode(errors="replace")

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Inverse of `convert_ids_to_tokens`, also for tokens that start or end inside a character."""
        return b"".join(map(self._bytes_of_token, tokens)).decode("utf-8", errors="replace")

    def _bytes_of_token(self, token: str) -> bytes:
        index = self.encoder.get(token, self._added_tokens_encoder.get(token))
        if index is not None:
            return self._bytes_of_id(index)
        known = self.byte_decoder
        return b"".join(bytes([known[c]]) if c in known else c.encode(errors="replace") for c in token)

    # Conversations

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]] | list[list[dict[str, Any]]],
        tools: list[dict[str, Any] | Callable] | None = None,
        documents: list[dict[str, str]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False,
        tokenize: bool | None = None,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = False,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: dict[str, Any] | None = None,
        sanitize_control_tokens: bool = False,
        trusted_text: bool = False,
        mark_text: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The prompt of a conversation, or of a batch of them, from messages as `normalize_messages` takes them.

        Three defaults differ from the base class, and are the same on transformers 4.57 and 5:
        add_generation_prompt: True, unless `continue_final_message` is given. Pass False to render training data.
        tokenize: False, so the result is text, unless `return_dict` or `return_tensors` asks for ids.
        return_dict: False, so ids are returned as a list or a tensor (5.x alone would return a dict).

        continue_final_message: leaves the last message open, after its content, or on 5.x inside its reasoning
            (`"reasoning_content"`).
        trusted_text: By default text in messages, tools and options never becomes a control token: a marker in it is
            encoded as plain text, so that a user or a web page cannot open a turn, a call or a think block. Ids of all
            other text, and the decoded text, are the same either way. True encodes markers in messages as control
            tokens, for prompts that are built by hand. In text (`tokenize=False`) the two cannot be told apart: see
            `sanitize_messages`.
        sanitize_control_tokens: transformers 5's name for the protection that is the default here.
        mark_text: For callers that tokenise themselves: text in which untrusted markers are wrapped, to be encoded with
            `tokenizer(text, marked=True)`.
        kwargs: variables of the template. Those that turn thinking off are rejected with a ValueError: `thinking=False`,
            `preserve_thinking=False`, `enable_thinking=False`, `reasoning_effort="none"`. None is "not given".
        """
        batched = bool(conversation) and not isinstance(conversation[0], Mapping)
        chats = [
            normalize_messages(getattr(c, "messages", c))
            for c in (conversation if batched else [conversation])
        ]
        if tokenize is None:
            tokenize = return_dict or return_tensors is not None
        if sanitize_control_tokens and (trusted_text or not tokenize):
            why = (
                "contradicts trusted_text=True"
                if trusted_text
                else "needs tokenize=True: in text, markers of users and of the template look alike"
            )
            raise ValueError(f"sanitize_control_tokens=True {why}.")
        guarded = mark_text or (tokenize and not trusted_text)
        if guarded:
            tokenizer_kwargs = {**(tokenizer_kwargs or {}), "marked": True}
        return self.render_normalized(
            chats if batched else chats[0],
            normalize_tools(tools),
            documents,
            kwargs,
            guarded_names=() if guarded else None,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template=chat_template,
            tokenize=tokenize,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            return_tensors=return_tensors,
            return_dict=return_dict,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
            tokenizer_kwargs=tokenizer_kwargs,
        )

    def render_normalized(
        self,
        chats: list[Any],
        tools: list[Any] | None,
        documents: list[dict[str, str]] | None,
        variables: dict[str, Any],
        guarded_names: Iterable[str] | None,
        add_generation_prompt: bool | None,
        continue_final_message: bool | str,
        **options: Any,
    ) -> Any:
        """The second half of `apply_chat_template`, for callers that have normalised messages and tools themselves.

        chats, tools: as `normalize_messages` and `normalize_tools` return them; nothing is checked here again.
        variables: of the template. guarded_names: what `mark_user_text` wraps besides the markers; None wraps nothing.
        """
        refuse_to_stop_thinking(variables)
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        if tools:
            variables = {"tools_ts_str": render_tool_declaration(tools), **variables}
        if guarded_names is not None:
            chats, tools, documents, variables = self.mark_user_text(
                (chats, tools, documents, variables), guarded_names
            )
        return super().apply_chat_template(
            chats,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=field_to_continue(continue_final_message),  # type: ignore[arg-type]
            **options,
            **variables,
        )

    # Completions

    def parse_completion(self, text_or_ids: Any) -> dict[str, Any]:
        """The message that was generated after a prompt: see `kimi_output.parse_completion`. Prefer ids to text; text
        must be decoded with `skip_special_tokens=False`."""
        return parse_completion(text_or_ids, self)

    def completion_stream(self) -> KimiCompletionStream:
        """Reads a completion piece by piece, as text or ids, and returns deltas in OpenAI's format."""
        return KimiCompletionStream(self)

    def text_streamer(self, **options: Any) -> KimiTextStreamer:
        """For `generate(streamer=...)`: shows reasoning, content and tool calls as they are generated."""
        return KimiTextStreamer(self, **options)

    @staticmethod
    def validate_tool_call(call: Mapping[str, Any], tools: Iterable[Any] | None) -> CallCheck:
        """Checks a parsed call against tools in any form that `apply_chat_template` takes: `errors`, `unchecked`."""
        return validate_tool_call(call, normalize_tools(tools))

    @staticmethod
    def normalize_tool_ids(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Messages whose calls and results have ids as the model makes them: functions.NAME:N."""
        return normalize_tool_ids(messages)


# save_pretrained copies this file and names it in auto_map, also if the class was imported directly.
TikTokenTokenizer.register_for_auto_class("AutoTokenizer")
