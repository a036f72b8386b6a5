"""Conversations with images and videos to model inputs: the tokenizer and the image processor in one call.

    messages, tools
      tokenizer     template -> text, with one <|media_pad|> per image and <|kimi_k25_video_placeholder|> per video
      here          each video placeholder -> one line of text per chunk, "00:00:02.100<|media_begin|>video...", with
                    one <|media_pad|> each
      tokenizer     text -> ids
      here          each <|media_pad|> -> as many as the item has tokens; rows padded on the left
      image processor   items -> pixel_values (P, 3, 14, 14), grid_thws (N, 3)

Three ways to call, which differ in who expands the placeholders:

    apply_chat_template(messages, return_dict=True), or processor(messages=...)      expanded
    processor(text=..., images=..., videos=...)                                      expanded
    processor(text=..., medias=[...])       as serving engines call: tokenised exactly as given, never expanded
    expand_media=True or False              overrides each

The model takes expanded placeholders only. Media are numbered in document order, in messages of any role: a tool
result may contain a screenshot. In a conversation only the template writes placeholders: if a user types
<|media_pad|>, a turn marker or the name of the video placeholder, it stays text. With `text=` the caller wrote the
prompt, and every marker in it is a marker.

A call that fails raises before any tensor exists: ValueError for wrong media or placeholders, OSError for files and
addresses that cannot be read. The message names the item.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import transformers
from PIL import Image
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.utils import logging

from .kimi_media import decode_base64, drain, naming, open_image
from .kimi_messages import normalize_messages, normalize_tool_ids
from .kimi_tools import normalize_tools

logger = logging.get_logger(__name__)

MEDIA_PAD = "<|media_pad|>"
VIDEO_PLACEHOLDER = "<|kimi_k25_video_placeholder|>"  # text, not a token; `video_placeholder` of config.json
# Where a content part may keep its medium: OpenAI's names first, then those of transformers.
SOURCES = {
    "image": ("image_url", "image", "url", "path", "base64"),
    "video": ("video_url", "video", "url", "path", "base64"),
}
MAJOR = int(transformers.__version__.split(".")[0])


@dataclass
class PreparedChat:
    """A conversation that is checked, normalised and has its media open; `apply_chat_template` takes it once.

    It is an object of its own, made by `prepare_chat` alone, so no message that a user sends can be taken for one.
    """

    chats: list[list[dict[str, Any]]]  # normalised; parts of media have no source
    tools: list[dict[str, Any]] | None
    items: list[dict[str, Any]] | None  # for the image processor; None once they are taken
    video_prompts: list[str]

    def take_media(self) -> tuple[list[dict[str, Any]], list[str]]:
        """Items and video prompts. They leave this object, so that a decoded image is not kept longer than needed."""
        items, self.items = self.items, None
        if items is None:
            raise ValueError("this PreparedChat was used already; call prepare_chat again")
        return items, self.video_prompts


class KimiK25Processor(ProcessorMixin):
    """Tokenizer and image processor of Kimi K2.7 Code. `media_processor` is the image processor under the name that
    serving engines use."""

    attributes = ["image_processor", "tokenizer"]  # noqa: RUF012 (the name and type that transformers 4.57 reads)
    if MAJOR < 5:  # 5.x finds them by itself and warns about these two
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"
    video_placeholder = VIDEO_PLACEHOLDER
    image_processor: Any
    tokenizer: Any
    chat_template: str | dict[str, str] | None

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @property
    def media_processor(self) -> Any:
        return self.image_processor

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "grid_thws"]

    def __call__(
        self,
        messages: Any = None,
        medias: Any = None,
        text: str | list[str] | None = None,
        return_tensors: str | None = "pt",
        *,
        images: Any = None,
        videos: Any = None,
        expand_media: bool | None = None,
        allowed_hosts: Collection[str] = (),
        **kwargs: Any,
    ) -> BatchFeature:
        """Model inputs from messages, from text with media items, or from text with images and videos.

        Args:
            messages: a conversation or a list of them; further keywords as `apply_chat_template` takes them.
            medias: items {"type": "image", "image": ...}, {"type": "video", "video": ..., "fps": ...} or
                {"type": "video_chunk", "video_chunk": [frames]}, of all rows one after the other.
            text: a prompt or a list of prompts. With medias, images and videos are ignored, since an engine may pass the
                same media twice.
            images, videos: one, a list, or a list for each prompt, of any source that kimi_media.py names; a list of
                frames is one video. The i-th placeholder of a kind belongs to the i-th of them.
            return_tensors: "pt", "np", or None for lists of ids.
            expand_media: see the module docstring.
            allowed_hosts: hosts of loopback or private addresses from which media may be fetched.
            kwargs: padding (by default if several rows become one tensor), truncation, max_length, padding_side,
                pad_to_multiple_of. Others, which engines pass to every processor, have no effect.

        Returns:
            input_ids and attention_mask (B, T); with media pixel_values (P, 3, 14, 14) and grid_thws (N, 3).
        """
        if messages is not None:
            if medias is not None or text is not None or images is not None or videos is not None:
                raise ValueError(
                    "give messages alone: they contain the media, and the text is rendered from them"
                )
            return self.apply_chat_template(
                messages,
                tokenize=True,
                return_dict=True,
                return_tensors=return_tensors,
                expand_media=expand_media,
                allowed_hosts=allowed_hosts,
                **kwargs,
            )
        if text is None:
            raise ValueError(
                "give messages or text; images, videos and medias need a text with their placeholders"
            )
        texts = [text] if isinstance(text, str) else list(text)
        if medias is None:
            check_rows(texts, images)
            medias = media_in_order(texts, as_list(images), as_videos(videos))
            expand_media = True if expand_media is None else expand_media
        elif isinstance(medias, Mapping):
            medias = [medias]
        return self._encode(
            texts,
            medias,
            guarded=False,
            expand_media=bool(expand_media),
            return_tensors=return_tensors,
            allowed_hosts=allowed_hosts,
            **kwargs,
        )

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        tools: list[dict[str, Any] | Callable] | None = None,
        documents: list[dict[str, str]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False,
        tokenize: bool | None = None,
        return_dict: bool = False,
        return_tensors: str | None = "auto",
        padding: bool | str | None = None,
        truncation: bool | str = False,
        max_length: int | None = None,
        padding_side: str | None = None,
        pad_to_multiple_of: int | None = None,
        expand_media: bool | None = None,
        allowed_hosts: Collection[str] = (),
        processor_kwargs: dict[str, Any] | None = None,
        trusted_text: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The prompt of a conversation, or of a list of them, as text or as model inputs.

        Args:
            conversation: messages as `normalize_messages` takes them, a list of such conversations, or what `prepare_chat`
                returned, which holds its tools.
            tokenize: whether to return ids; by default if `return_dict` or `return_tensors` asks for them. False returns
                text with one placeholder per medium, and reads no medium.
            return_dict: True returns all inputs of the model, False only the ids.
            return_tensors: "auto" is "pt". Others as in `__call__`, and so are the keywords for padding and truncation.
            expand_media: whether each placeholder is repeated for every token of its medium; by default True.
            processor_kwargs: keywords of `__call__`, as transformers 5 groups them.
            trusted_text: only if True may text in messages, tools and options become control tokens or placeholders.
            kwargs: variables of the template.
        """
        tokenize = return_dict or return_tensors not in ("auto", None) if tokenize is None else tokenize
        if kwargs.pop("return_assistant_tokens_mask", False):
            raise ValueError("return_assistant_tokens_mask is not available: the tokenizer has no offsets")
        options = {
            "chat_template": self._template(chat_template),
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tokenize": False,
        }
        if isinstance(conversation, PreparedChat):
            if tools is not None or not tokenize:
                raise ValueError(
                    "a PreparedChat has its tools and becomes ids; leave tools and tokenize=False out"
                )
            chats, tools, media = conversation.chats, conversation.tools, conversation
        elif not tokenize:
            return self.tokenizer.apply_chat_template(
                conversation, tools=tools, documents=documents, **options, **kwargs
            )
        else:
            chats, media = prepare_conversations(conversation)
            tools = normalize_tools(tools)
        names = None if trusted_text else [self.video_placeholder]
        texts = self.tokenizer.render_normalized(
            chats, tools, documents, kwargs, guarded_names=names, **options
        )
        call = {
            "expand_media": expand_media is not False,
            "return_tensors": "pt" if return_tensors == "auto" else return_tensors,
            "allowed_hosts": allowed_hosts,
            "padding": padding,
            "truncation": truncation,
            "max_length": max_length,
            "padding_side": padding_side,
            "pad_to_multiple_of": pad_to_multiple_of,
        }
        guarded = not trusted_text
        inputs = self._encode(texts, media, guarded, **{**call, **(processor_kwargs or {})})
        return inputs if return_dict else inputs["input_ids"]

    def prepare_chat(
        self,
        messages: Any,
        tools: list[dict[str, Any]] | None = None,
        allowed_hosts: Collection[str] = (),
        renumber_calls: bool = False,
    ) -> PreparedChat:
        """A conversation with its media open and nothing computed, for callers that check sizes first.

        Args:
            tools: as `normalize_tools` returns them.
            renumber_calls: whether tool calls get new ids (`normalize_tool_ids`), so that none comes twice.
        """
        chats, medias = prepare_conversations(
            messages, normalize_tool_ids if renumber_calls else normalize_messages
        )
        return PreparedChat(chats, tools, *self.preprocess_medias(medias, allowed_hosts))

    def _template(self, chat_template: str | None) -> str | None:
        """The template to render with, from a template or its name. None: the tokenizer chooses."""
        if isinstance(self.chat_template, Mapping):
            return self.chat_template.get(chat_template or "default", chat_template)
        return chat_template or self.chat_template

    def _encode(
        self,
        texts: list[str],
        media: Sequence[Mapping[str, Any]] | PreparedChat,
        guarded: bool,
        expand_media: bool,
        return_tensors: str | None,
        allowed_hosts: Collection[str] = (),
        padding: bool | str | None = None,
        truncation: bool | str = False,
        max_length: int | None = None,
        padding_side: str | None = None,
        pad_to_multiple_of: int | None = None,
        **ignored: Any,
    ) -> BatchFeature:
        """Everything after the text. guarded: user text in it is wrapped by `mark_user_text`; False for a prompt that
        the caller wrote."""
        if without_effect := sorted(key for key, value in ignored.items() if value is not None):
            logger.warning_once(f"keywords without effect: {without_effect}")  # type: ignore[attr-defined]
        items, video_prompts = (
            media.take_media()
            if isinstance(media, PreparedChat)
            else self.preprocess_medias(media, allowed_hosts)
        )
        texts = self._insert_video_prompts(texts, video_prompts, guarded)
        options = {"marked": True} if guarded else {}
        rows = [list(self.tokenizer(text, **options)["input_ids"]) for text in texts]
        counts = [self.image_processor.media_tokens_calculator(item) for item in items]
        pad_id = self.tokenizer.convert_tokens_to_ids(MEDIA_PAD)
        rows = fit_placeholders(rows, pad_id, counts, expand_media)
        if truncation and truncation != "do_not_truncate":
            limit = max_length or self.tokenizer.model_max_length
            rows = [truncate(row, limit, self.tokenizer.truncation_side, pad_id) for row in rows]
        inputs = self.tokenizer.pad(
            {"input_ids": rows},
            padding=len(rows) > 1 and return_tensors is not None if padding is None else padding,
            max_length=max_length if padding == "max_length" else None,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_tensors=return_tensors,
        )
        features = self.image_processor.preprocess(drain(items), return_tensors)
        return BatchFeature({**inputs, **features})

    def preprocess_medias(
        self, medias: Sequence[Mapping[str, Any]], allowed_hosts: Collection[str] = ()
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Items for the image processor, and the text of each video.

        Images are opened but not decoded; a video becomes chunks, whose frames are decoded when they are read. The given
        dicts are not changed.
        """
        items: list[dict[str, Any]] = []
        video_prompts: list[str] = []
        for index, media in enumerate(medias):
            name = media.get("name") or f"medias[{index}]"
            with naming(name):
                if media.get("type") == "image":
                    image = open_image(media.get("image"), allowed_hosts)
                    items.append({**media, "image": image, "name": name})
                elif media.get("type") == "video":
                    chunks = self.image_processor.open_chunks(
                        media.get("video"), media.get("fps"), allowed_hosts
                    )
                    items += [{**chunk, "name": name, "video_idx": len(video_prompts)} for chunk in chunks]
                    video_prompts.append("".join(chunk["prompt"] for chunk in chunks))
                elif media.get("type") == "video_chunk":
                    items.append({**media, "name": name})
                else:
                    raise ValueError(f"type must be image, video or video_chunk, not {media.get('type')!r}")
        return items, video_prompts

    def update_raw_text(self, text: str, video_prompts: Sequence[str]) -> str:
        """The text with each video placeholder replaced by the prompts of that video's chunks."""
        return self._insert_video_prompts([text], video_prompts)[0]

    def _insert_video_prompts(
        self, texts: list[str], video_prompts: Sequence[str], guarded: bool = False
    ) -> list[str]:
        """The texts with the i-th video placeholder of them all replaced by the i-th prompt. guarded: a placeholder that
        a user typed is wrapped, and is written out as the text it is."""
        name, pieces, typed = self.video_placeholder, [[text] for text in texts], ""
        if guarded:
            wrapped, typed = self.tokenizer.mark_user_text(name, [name]), self.tokenizer.mark_user_text(name)
            pieces = [text.split(wrapped) for text in texts]
        found = sum(piece.count(name) for row in pieces for piece in row)
        if found != len(video_prompts):
            raise ValueError(
                f"found {found} video placeholders {name} in the text but {len(video_prompts)} videos"
            )
        prompts = iter(video_prompts)
        pattern = re.escape(name)
        return [
            typed.join(re.sub(pattern, lambda _: next(prompts), piece) for piece in row) for row in pieces
        ]

    def to_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """For processor_config.json, without the image processor's settings: transformers 5 would nest them here and
        then no longer read preprocessor_config.json."""
        output = super().to_dict(*args, **kwargs)
        output.pop("image_processor", None)
        return output

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """ProcessorMixin.save_pretrained, always with preprocessor_config.json: transformers 4.57 and other engines
        read the settings of the image processor there."""
        self.image_processor.save_pretrained(save_directory)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


def prepare_conversations(
    conversation: Any, normalize: Callable[[Any], list[dict[str, Any]]] = normalize_messages
) -> tuple[list[list[dict[str, Any]]], list[dict[str, Any]]]:
    """Normalised conversations whose parts only say that there is a medium, and the media in document order."""
    batched = bool(conversation) and not isinstance(conversation[0], Mapping)
    given = [getattr(chat, "messages", chat) for chat in (conversation if batched else [conversation])]
    chats: list[list[dict[str, Any]]] = []
    medias: list[dict[str, Any]] = []
    for number, messages in enumerate(given):
        prefix = f"conversations[{number}]." if len(given) > 1 else ""
        with naming(f"conversations[{number}]") if prefix else nullcontext():
            chats.append([without_media(message) for message in normalize(messages)])
        medias += media_of_messages(messages, prefix)
    return chats, medias


def without_media(message: dict[str, Any]) -> dict[str, Any]:
    """The message for the template, without its media, which may be megabytes of base64."""
    content = message["content"]
    if isinstance(content, list):
        content = [part if part["type"] == "text" else {"type": part["type"]} for part in content]
    return {**message, "content": content}


def media_of_messages(messages: Sequence[Mapping[str, Any]], prefix: str) -> Iterator[dict[str, Any]]:
    """The media items of a conversation, in the order in which the template writes their placeholders."""
    for number, message in enumerate(messages):
        content = message.get("content")
        for position, part in enumerate(content if isinstance(content, (list, tuple)) else ()):
            if isinstance(part, Mapping) and part.get("type") not in (None, "text"):
                name = f"{prefix}messages[{number}].content[{position}]"
                yield {**medium_of_part(part, name), "name": name}


def medium_of_part(part: Mapping[str, Any], name: str) -> dict[str, Any]:
    kind = part["type"].removesuffix("_url")
    key = next((key for key in SOURCES[kind] if part.get(key) is not None), None)
    if key is None:
        raise ValueError(f"{name} is of type {part['type']!r} but has none of {', '.join(SOURCES[kind])}")
    with naming(name):
        source = decode_base64(part[key]) if key == "base64" else part[key]
    return {"type": kind, kind: source, **({"fps": part["fps"]} if part.get("fps") else {})}


def as_list(images: Any) -> list[Any]:
    """One image, a list, or a list per prompt, as one list."""
    if images is None:
        return []
    if not isinstance(images, (list, tuple)):
        return [images]
    return [image for given in images for image in as_list(given)]


def check_rows(texts: list[str], images: Any) -> None:
    """Checks images given as a list per prompt: as many lists as prompts, and in each list that prompt's images."""
    if not isinstance(images, (list, tuple)) or not all(isinstance(row, (list, tuple)) for row in images):
        return
    if images and len(images) != len(texts):
        raise ValueError(f"found {len(texts)} prompts but {len(images)} lists of images")
    found, given = [text.count(MEDIA_PAD) for text in texts], [len(row) for row in images]
    # Other sums: the text is expanded already, or is rejected when tokens are counted.
    if found != given and sum(found) == sum(given):
        raise ValueError(f"the prompts have {found} {MEDIA_PAD} but the lists of images have {given} entries")


def as_videos(videos: Any) -> list[Any]:
    """One video, a list, or a list per prompt, as one list. A list of frames is one video."""
    if videos is None:
        return []
    if not isinstance(videos, (list, tuple)) or (videos and all(is_frame(frame) for frame in videos)):
        return [videos]
    return [video for given in videos for video in as_videos(given)]


def is_frame(value: Any) -> bool:
    return isinstance(value, Image.Image) or (isinstance(value, np.ndarray) and value.ndim < 4)


def media_in_order(texts: list[str], images: list[Any], videos: list[Any]) -> list[dict[str, Any]]:
    """Images and videos as items, in the order of their placeholders in the texts."""
    named = {
        MEDIA_PAD: [
            {"type": "image", "image": image, "name": f"images[{i}]"} for i, image in enumerate(images)
        ],
        VIDEO_PLACEHOLDER: [
            {"type": "video", "video": video, "name": f"videos[{i}]"} for i, video in enumerate(videos)
        ],
    }
    places = re.findall(f"{re.escape(MEDIA_PAD)}|{re.escape(VIDEO_PLACEHOLDER)}", "".join(texts))
    if not videos and VIDEO_PLACEHOLDER not in places:
        return named[MEDIA_PAD]  # the text may be expanded already; `fit_placeholders` counts its tokens
    for placeholder, items in named.items():
        if places.count(placeholder) != len(items):
            kind = "images" if placeholder == MEDIA_PAD else "videos"
            raise ValueError(
                f"found {places.count(placeholder)} {placeholder} in the text but {len(items)} {kind}"
            )
    queues = {placeholder: iter(items) for placeholder, items in named.items()}
    return [next(queues[placeholder]) for placeholder in places]


def fit_placeholders(rows: list[list[int]], pad_id: int, counts: list[int], expand: bool) -> list[list[int]]:
    """The rows, with the i-th placeholder of all rows repeated counts[i] times if `expand` is set and they are not
    expanded yet. Raises ValueError unless there is one placeholder per item or one per token."""
    found = sum(row.count(pad_id) for row in rows)
    if found not in (len(counts), sum(counts)):
        raise ValueError(
            f"found {found} {MEDIA_PAD} in the text, but there are {len(counts)} media items (images and video "
            f"chunks), which take {sum(counts)} tokens"
        )
    if not expand or found != len(counts):
        return rows
    lengths = iter(counts)
    return [
        [i for token in row for i in ([token] * next(lengths) if token == pad_id else (token,))]
        for row in rows
    ]


def truncate(row: list[int], max_length: int, side: str, pad_id: int) -> list[int]:
    """The first, or with side "left" the last, `max_length` ids. Raises ValueError rather than cut off a placeholder."""
    if len(row) <= max_length:
        return row
    kept = row[-max_length:] if side == "left" else row[:max_length]
    found, left = row.count(pad_id), kept.count(pad_id)
    if found != left:
        raise ValueError(
            f"truncation from {len(row)} to {max_length} tokens would cut off {found - left} of {found} {MEDIA_PAD}; "
            "allow more tokens, or give fewer or smaller media"
        )
    return kept
